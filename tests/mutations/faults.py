"""All faults, in the order in which they are run: quick areas first."""

from tests.mutations import (
    faults_counts,
    faults_kernels,
    faults_options,
    faults_proposers,
    faults_scheduler,
    faults_triton,
    faults_v1,
    faults_v2,
)

ALL = [
    *faults_kernels.FAULTS,
    *faults_proposers.FAULTS,
    *faults_triton.FAULTS,
    *faults_v1.FAULTS,
    *faults_options.FAULTS,
    *faults_scheduler.FAULTS,
    *faults_counts.FAULTS,
    *faults_v2.FAULTS,
]
