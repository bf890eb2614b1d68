"""The metrics of the paper's generation tables; ``docs/evaluation.md`` says how each is computed.

Everything heavy is imported where it is used: importing this costs nothing.
"""

from minilm_fast.metrics.meteor_score import METEORS, meteor
from minilm_fast.metrics.questions import bleu, coco_rouge_l, question_generation
from minilm_fast.metrics.rouge_scores import RougeScore, rouge, rouge_of_each
from minilm_fast.metrics.tasks import TASKS, TOKENIZATIONS, best_metric, generation_scores

__all__ = [
    "METEORS",
    "TASKS",
    "TOKENIZATIONS",
    "RougeScore",
    "best_metric",
    "bleu",
    "coco_rouge_l",
    "generation_scores",
    "meteor",
    "question_generation",
    "rouge",
    "rouge_of_each",
]
