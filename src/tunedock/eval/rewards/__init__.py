"""What scores completions while training: reward models, Python functions, judges behind an endpoint.

score = make_scorer(recipe.objective.rewards, hub=recipe.hub, offline=recipe.offline)
scores = score(completions)          # scores.total, scores.parts, scores.metrics
"""

from tunedock.eval.rewards.completion import Completion, Moment, Scores, Source
from tunedock.eval.rewards.scoring import Scorer, make_scorer

__all__ = ["Completion", "Moment", "Scorer", "Scores", "Source", "make_scorer"]
