"""Small faults in the decoding core, put in one at a time: which tests find each, and how soon. Run by hand.

    python -m tests.mutations --list
    python -m tests.mutations --area v1 --results out/mutations.json
    python -m tests.mutations --only verify-ratio-inverted gate-one-row-early

Nothing is changed in the working tree: each fault goes into a copy of its own, and the tests run there. The tests that
faults name must pass without any first. With --results a run that was cut goes on where it was.
"""
