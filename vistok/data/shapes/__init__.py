"""The lab world: an unlimited, captioned world of coloured shapes, and an oracle that reads it back.

>>> from vistok.data import shapes
>>> scene = shapes.scene_for("a large red circle above a small blue star", seed=0)
>>> image = shapes.render(scene, 64)  # uint8 [64, 64, 3]
>>> bool(shapes.satisfies("a red circle above a blue star", shapes.read_scene(image)))
True
"""

from __future__ import annotations

from vistok.data.shapes.captions import (
    MAX_CAPTION_WORDS,
    VOCABULARY,
    Description,
    Match,
    Phrase,
    caption,
    describe,
    parse_caption,
    satisfies,
    scene_for,
)
from vistok.data.shapes.dataset import ShapesDataset, ShapesStream, collate, image_to_tensor
from vistok.data.shapes.oracle import Reading, SeenObject, read_scene, read_scenes
from vistok.data.shapes.questions import (
    ANSWERS,
    QUESTION_KINDS,
    QUESTION_VOCABULARY,
    Question,
    question,
    questions,
    questions_in_turn,
    write_questions,
)
from vistok.data.shapes.render import render
from vistok.data.shapes.scene import (
    CLASS_NAMES,
    COLOURS,
    RELATIONS,
    SHADES,
    SHAPES,
    SIZES,
    Background,
    Scene,
    SceneObject,
    object_rgb,
    relation_between,
    sample_scene,
    sample_scenes,
)

__all__ = [
    "ANSWERS",
    "Background",
    "CLASS_NAMES",
    "COLOURS",
    "Description",
    "MAX_CAPTION_WORDS",
    "Match",
    "Phrase",
    "QUESTION_KINDS",
    "QUESTION_VOCABULARY",
    "Question",
    "RELATIONS",
    "Reading",
    "SHADES",
    "SHAPES",
    "SIZES",
    "Scene",
    "SceneObject",
    "SeenObject",
    "ShapesDataset",
    "ShapesStream",
    "VOCABULARY",
    "caption",
    "collate",
    "describe",
    "image_to_tensor",
    "object_rgb",
    "parse_caption",
    "question",
    "questions",
    "questions_in_turn",
    "read_scene",
    "read_scenes",
    "relation_between",
    "render",
    "sample_scene",
    "sample_scenes",
    "satisfies",
    "scene_for",
    "write_questions",
]
