"""Answering a file of prompts on Ray, each row exactly once, however often the run is killed.

`rows` reads the input, `journal` keeps what is answered, `replica` is an engine in a Ray actor, `run` hands rows out.

Ray's actors are used, not Ray Data: its batch processor hands back whole batches, so a kill loses every finished answer
of the batches under way, and its checkpoints know blocks in a shared file system, not rows. Here an answer is in the
journal as soon as it is finished.
"""
