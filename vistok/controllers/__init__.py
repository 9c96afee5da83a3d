"""Controllers steer any diffusers text-to-image pipeline. They attach through `vistok.attach`; none is there yet."""
