"""Random fault histories in the simulator, over every algorithm: ``python -m tests.soak 1000 7`` (number, seed).

``programs`` are algorithms and a task that ask for trouble, ``histories`` draws configurations, ``watch`` lives through
one and checks what it sees, ``shrink`` makes a failing one as small as it can.
"""
