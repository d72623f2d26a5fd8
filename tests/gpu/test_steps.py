"""Whole steps that look ahead, in CUDA graphs and eagerly: every layer finds its own experts, in every step."""

import pytest
import torch
from gpu_model import NUM_EXPERTS, NUM_LAYERS, NUM_SLOTS, Model

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.residency import POLICIES, ExpertCache


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru"])
def test_replays_with_other_routing_fetch_their_own_experts_in_every_layer(policy):
    """Narrow and wide steps in one graph, with rows of padding."""
    model = Model(policy)
    model.route()
    graph = model.capture()
    for number in range(400):
        model.step(graph, num_experts=NUM_SLOTS if number % 2 else NUM_EXPERTS, share_real=(number % 8) / 7)
    for number, words in enumerate(model.finish()):
        assert 0 < words.wide_steps < words.steps
        assert words.overflow > 0
        assert words.used > 0 or number == 0, "no prefetch was of use"


@pytest.mark.parametrize("is_captured", [True, False])
def test_what_the_next_layers_wide_step_needs_comes_to_rows_that_this_layer_does_not_read(is_captured):
    """More experts are guessed than there are slots, and as few: a preload and a prefetch, in one graph."""
    model = Model("ewma", areas=2)
    model.route()
    graph = model.capture() if is_captured else None
    for number in range(300):
        model.step(graph, num_experts=NUM_SLOTS if number % 3 == 0 else NUM_EXPERTS, share_real=(number % 8) / 7)
    found = model.finish()
    assert all(words.num_preloaded == 0 for words in found)
    for words in found[1:]:
        assert words.used > words.num_slots * 10
        assert words.overflow < found[0].overflow / 2, "overflow rows were filled by the step itself"


def test_a_step_that_broke_off_leaves_nothing_on_its_way_to_rows_of_other_layers():
    model = Model(areas=2)
    for _ in range(50):
        model.step()
        model.route(share_real=1)
        model.layers[0].cache.serve(model.ids[0], model.rows)
        with model.caches.aside():
            model.layers[1].cache.preload(model.guesses[1], model.rows)
        model.layers[3].cache.serve(model.ids[3], model.rows)
        assert model.words()[1].num_preloaded == 0
    model.finish()


def test_layers_keep_their_slots_while_others_use_the_overflow_rows():
    """Without look-ahead, so that a wide step leaves the slots as they are: what comes next hits in them."""
    model = Model()
    model.route(num_experts=NUM_SLOTS, share_real=1)
    graph = model.capture(ahead=False)
    model.step(graph, num_experts=NUM_SLOTS, share_real=1)
    for _ in range(100):
        before = model.words()
        model.step(graph, share_real=1)
        model.step(graph, num_experts=NUM_SLOTS, share_real=1)
        deltas = [now.since(then) for now, then in zip(model.words(), before, strict=True)]
        assert all(delta.wide_steps == 1 and delta.overflow == delta.misses for delta in deltas)
    model.finish()


def test_a_step_of_padding_fetches_and_counts_nothing():
    model = Model()
    model.route(share_real=0)
    graph = model.capture()
    for _ in range(5):
        model.step(graph, share_real=0)
    for words in model.finish():
        assert sum(words[Words._fields.index("steps") :]) == 0
        assert words.num_free == NUM_SLOTS


@pytest.mark.parametrize(("policy", "ahead"), [("lru", False), ("ewma", True)])
def test_ghost_caches_count_in_replays_what_the_specification_counts_at_their_size(policy, ahead):
    """Whether the layer looks ahead or not; its own words are those of a layer without ghosts."""
    model, other = Model(policy), Model(policy)
    model.caches.add_ghosts([1.5, 2.0])
    specified = [[ExpertCache(NUM_EXPERTS, slots, POLICIES[policy]) for slots in (18, 24)] for _ in range(NUM_LAYERS)]
    expected = torch.zeros(NUM_LAYERS, 2, 2, dtype=torch.int64)
    for each in (model, other):
        each.route(share_real=0)
    graphs = [each.capture(ahead) for each in (model, other)]
    for number in range(100):
        routing = {"num_experts": NUM_SLOTS if number % 2 else NUM_EXPERTS, "share_real": (number % 8) / 7}
        for each, graph in zip((model, other), graphs, strict=True):
            each.step(graph, **routing)
        ids = model.ids.masked_fill((model.rows < 0)[:, None], -1).flatten(1).tolist()
        for layer, caches in enumerate(specified):
            for ghost, cache in enumerate(caches):
                plan = cache.plan(ids[layer])
                expected[layer, ghost] += torch.tensor([plan.num_hits, len(plan.loads)])
    own, others = model.finish(), other.finish()
    assert own == others or ahead, "what of a prefetch has landed depends on the clock"
    assert all((words.used > 0) == ahead for words in own[1:])
    names = ("hits", "misses")
    found = model.caches.ghost_mirror[:NUM_LAYERS, :, [Words._fields.index(name) for name in names]]
    assert found.tolist() == expected.tolist()
    assert bool((expected > 0).all())
    assert other.caches.ghost_mirror is None


def test_a_budget_that_changes_while_a_graph_is_replayed_is_obeyed():
    model = Model(depth=1)
    model.route()
    graph = model.capture()
    for budget, least, most in ((NUM_SLOTS, 1, NUM_SLOTS), (0, 0, 0), (-1, 0, 0), (1, 0, 1)):
        for layer in model.layers:
            layer.cache.set_budget(budget, 99)
        before = model.words()
        for _ in range(30):
            model.step(graph, num_experts=8)
        issued = [now.issued - then.issued for now, then in zip(model.words(), before, strict=True)]
        assert issued[0] == 0
        assert all(least <= number <= 30 * most for number in issued[1:])
    model.finish()


def test_a_budget_that_changes_at_any_moment_does_no_harm():
    model = Model("lfru")
    model.route()
    graph = model.capture()
    for step in range(200):
        for number, layer in enumerate(model.layers):  # while the step before may be running
            for distance in (1, 2):
                layer.cache.set_budget((step + number) % 7 - distance, 99, distance)
        model.step(graph)
    model.finish()


def test_eager_steps_and_replays_follow_each_other():
    model = Model()
    model.route()
    model.run()
    graph = model.capture()
    for _ in range(20):
        for _ in range(3):
            model.step()
        model.caches.join()  # vLLM, before a replay
        for _ in range(3):
            model.step(graph)
    model.finish()


def test_nothing_waits_for_the_gpu():
    model = Model()
    model.route()
    model.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.run()
        model.caches.join()
        model.layers[0].cache.set_budget(3, 99)
        model.layers[0].cache.words()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    model.finish()


def test_the_mirror_holds_the_words_of_every_layer():
    model = Model()
    for _ in range(5):
        model.step()
    model.route(share_real=0)
    model.run(ahead=False)
    found = model.finish()
    assert [Words._make(row) for row in model.caches.mirror[:NUM_LAYERS].tolist()] == found
    assert [layer.cache.words() for layer in model.layers] == found
    assert [layer.cache.num_resident for layer in model.layers] == [words.num_resident for words in found]


def test_errors_of_kernels_are_in_the_words_of_their_layer_after_its_next_step():
    model = Model()
    model.step()
    model.layers[2].ask([(NUM_EXPERTS, 0), (0, NUM_EXPERTS)])
    model.layers[2].cache.gather()
    assert [words.errors for words in model.words()] == [0] * NUM_LAYERS
    model.step()
    assert [words.errors for words in model.words()] == [0, 0, 2, 0]
    assert [layer.cache.words().errors for layer in model.layers] == [0, 0, 2, 0]
    assert model.caches.num_errors() == 2
