"""Routing: the experts and weights that the target model would choose, and sensible ones beyond top-k."""

import pytest
import torch

from vllm_expert_prefetch.prediction import Routing


def reference(logits, routing):
    """Experts and weights of one token by the definition, as plain loops."""
    scores = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}[routing.scoring](logits.double()).tolist()
    bias = [0.0] * len(scores) if routing.correction_bias is None else routing.correction_bias.tolist()
    chosen_by = [score + own for score, own in zip(scores, bias, strict=True)]
    size = len(scores) // routing.num_groups
    groups = [list(range(start, start + size)) for start in range(0, len(scores), size)]
    num_best = 1 if routing.correction_bias is None else 2
    groups.sort(key=lambda group: -sum(sorted((chosen_by[e] for e in group), reverse=True)[:num_best]))
    eligible = [expert for group in groups[: routing.top_groups] for expert in group]
    ids = sorted(eligible, key=lambda expert: -chosen_by[expert])[: routing.top_k]
    weights = [scores[expert] for expert in ids]
    total = sum(weights) if routing.renormalize else 1.0
    return ids, [routing.scaling * weight / total for weight in weights]


BIAS = torch.tensor([0.3, -0.2, 0.0, 0.1, -0.4, 0.2, 0.05, -0.1, 0.15, 0.0, -0.3, 0.25])


@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)], ids=["no groups", "groups"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_first_top_k_are_the_models_own(scoring, renormalize, groups, bias):
    routing = Routing(4, scoring, renormalize, bias, *groups, scaling=2.5)
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    ids, weights = routing.choose(logits, 6)
    for row in range(50):
        true_ids, true_weights = reference(logits[row], routing)
        assert ids[row, :4].tolist() == true_ids
        torch.testing.assert_close(weights[row, :4].double(), torch.tensor(true_weights).double(), rtol=1e-5, atol=1e-6)


def test_guesses_beyond_top_k_leave_the_chosen_groups_last():
    routing = Routing(1, num_groups=2, top_groups=1)
    ids, _ = routing.choose(torch.tensor([[5.0, 1.0, 4.0, 3.0]]), 4)
    assert ids.tolist() == [[0, 1, 2, 3]]


def test_more_guesses_than_experts_are_all_experts():
    ids, weights = Routing(2).choose(torch.randn(3, 4), 9)
    assert ids.sort(-1)[0].tolist() == [[0, 1, 2, 3]] * 3
    assert weights.shape == (3, 4)


def test_an_unknown_scoring_is_refused():
    with pytest.raises(ValueError, match="hash"):
        Routing(2, "hash")
