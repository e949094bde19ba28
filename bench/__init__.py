"""`python -m bench` measures fastattn and its peers and writes records; `bench.readme` shows them as tables."""
