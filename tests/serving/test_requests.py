"""What a request or a scheduler may ask of vLLM, all in one engine: the tokens are those of plain vLLM."""

import pytest
from engines import TINY_MODEL, counters, greedy, open_engine, prompts

OPTIONS = {"enable_prefix_caching": True, "max_num_batched_tokens": 64, "max_num_seqs": 8, "disable_log_stats": False}
LONG = [" ".join([*prompts(4), last]) for last in prompts(11)[8:]]
SHORT = ["In the beginning", "It was a", "The people of"]
"""In one piece: plain vLLM's CPU build fails at a seeded request in pieces."""
HITS = "vllm:prefix_cache_hits"


def sampled(llm, seed):
    """Three completions of each short prompt: tokens, and the log-probabilities of the two best at each place."""
    from vllm import SamplingParams

    sampling = SamplingParams(n=3, seed=seed, temperature=1, top_p=0.9, max_tokens=24, logprobs=2, ignore_eos=True)
    return [
        (
            tuple(one.token_ids),
            [sorted((entry.logprob for entry in place.values()), reverse=True) for place in one.logprobs],
        )
        for request in llm.generate(SHORT, sampling, use_tqdm=False)
        for one in request.outputs
    ]


@pytest.mark.proves("chunked prefill")
@pytest.mark.proves("prefix caching")
@pytest.mark.proves("several completions of a request (`n`)")
@pytest.mark.proves("sampling with a seed")
@pytest.mark.engine
def test_prompts_in_pieces_with_a_common_prefix_and_sampled_completions_are_those_of_plain_vllm():
    def run(config):
        with open_engine(TINY_MODEL, config, **OPTIONS) as llm:
            lengths = [len(llm.get_tokenizer().encode(prompt)) for prompt in LONG]
            assert min(lengths) > 4 * OPTIONS["max_num_batched_tokens"]
            outputs = [greedy(llm, LONG), greedy(llm, LONG), sampled(llm, 7), sampled(llm, 7), sampled(llm, 8)]
            hits = next(metric.value for metric in llm.get_metrics() if metric.name == HITS)
            return outputs, hits, config and counters(llm)

    expected, hits_of_stock, _ = run(None)
    served, hits, counted = run({"cache_fraction": 0.5, "prefetch": "on", "emulated_link_gbps": 0.2})
    assert served == expected
    assert hits == hits_of_stock > 0
    first, again, other = ([tokens for tokens, _ in outputs] for outputs in served[2:])
    assert first == again != other
    assert len(set(first)) == 9
    assert min(counted["lookups_total/miss"], counted["predictions_total/used"], counted["moe_steps_total/wide"]) > 0
