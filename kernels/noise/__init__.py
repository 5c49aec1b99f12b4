"""Random numbers by counter (Philox 4x32-10): what a draw is, not when it is made, decides its noise.

The key is the request's seed; the counters are the vocabulary index, the row's position in the sequence and the stream.
So noise never depends on the batch, a seed reproduces its text, and the streams that draw drafts, accept them and
resample after a rejection are independent of each other.
"""

ACCEPT, RESAMPLE, DRAFT = 1, 2, 3  # the third counter
