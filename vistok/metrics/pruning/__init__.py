"""What pruning does to a model on somebody's own questions: answers, accuracy, operations, cache, time.

    model, processor = load_lvlm("llava-hf/llava-1.5-7b-hf")
    asker = Asker(model, processor)
    asker.ask(picture, "What colour is the car?", "transprune", 0.25)

    report = evaluate_pruners(model, processor, load_questions("pictures"), folder="evaluation")

Every method is asked for the same *keep ratio*: the share of the visual tokens that is left after its last stage.
Methods that act inside the decoder see all tokens until then, so at one keep ratio they cost more; compare accuracy
against operations (`pareto`), not against the ratio alone.
"""

from __future__ import annotations

from vistok.metrics.pruning.asking import UNPRUNED, Answer, Asker, load_lvlm
from vistok.metrics.pruning.evaluation import (
    KEEP_RATIOS,
    Winner,
    evaluate_pruners,
    paired_difference,
    pareto,
    plot_pareto,
    winners,
)
from vistok.metrics.pruning.methods import METHODS, Target, check_method, make_pruner
from vistok.metrics.pruning.questions import Question, answers_agree, held_out_questions, load_questions

__all__ = [
    "KEEP_RATIOS",
    "METHODS",
    "UNPRUNED",
    "Answer",
    "Asker",
    "Question",
    "Target",
    "Winner",
    "answers_agree",
    "check_method",
    "evaluate_pruners",
    "held_out_questions",
    "load_lvlm",
    "load_questions",
    "make_pruner",
    "paired_difference",
    "pareto",
    "plot_pareto",
    "winners",
]
