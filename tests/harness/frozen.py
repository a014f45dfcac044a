"""Imported last by the fork server: its objects are looked at no more by the garbage collectors of what it forks.

A full collection of what the libraries have made takes a third of a second, in every rank and job several times, and
writes to its pages, which were shared until then.
"""

import gc

gc.collect()
gc.freeze()
