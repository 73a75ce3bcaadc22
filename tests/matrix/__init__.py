"""The crash matrix: who is killed or what fails, at which point of an action, with which workload; and what must be true afterwards.

`cases` says what is done, `script` and `dress` do it inside the real daemon, `keeper` starts and buries daemons and programs, `bench` is
one node with all that belongs to it, `act` plays one case on it, `checks` looks at what is left, `reader` reads the store all along,
`table` counts. `scripts/crash-matrix` runs it.
"""
