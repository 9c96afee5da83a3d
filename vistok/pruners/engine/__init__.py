"""The run of a pruner inside a stock transformers model: forward hooks, and a listener to its image features.

One forward pass goes like this:

1. The call that makes image features is listened to: which images, how their tokens lie, and one attention map of the
   tower reduced to scores as soon as its layer runs.
2. Before the language model, stages of the places `tower` and `embeddings` shorten embeddings, positions and mask.
3. Before a pruning layer, its stage shortens the hidden states. Every later layer receives rotary tables, mask and
   position ids of its own length; caches shrink because the layers see fewer tokens.
4. While decoding, each group of layers between two stages (a *level*) gets the mask of its own cache length, and, where
   positions were closed up, its own rotary position.

What was removed lives with the cache (`Record`), so a second turn, a copied prefix and assisted decoding go on from it.

Shape letters: B batch, S tokens now, q new tokens of this call, n cached columns of a level, D width.
"""

from __future__ import annotations

from vistok.pruners.engine.flow import Flow
from vistok.pruners.engine.run import Engine

__all__ = ["Engine", "Flow"]
