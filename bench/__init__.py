"""`python -m bench` measures fastattn and its peers and writes records; `bench.readme` puts them into README.md."""
