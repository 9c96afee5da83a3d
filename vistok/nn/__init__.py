"""Building blocks that every network shares. Import the modules: `vistok.nn.attention`, `vistok.nn.sampling`, ..."""
