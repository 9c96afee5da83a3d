"""Pruners drop visual tokens in any transformers LVLM. They attach through `vistok.attach`; none is there yet."""
