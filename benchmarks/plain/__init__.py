"""Samplers as the papers describe them, without any of vistok's savings: what the benchmarks compare against."""
