"""Every Mixture-of-Experts model that the installed vLLM registers is in `registered.json`, with what is known of it.

They are found in vLLM's source: a registered class is one if what it names, and what that names in turn, makes routed
experts. Models that serve whatever language model a checkpoint names are not: that model is.
"""

import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest
import vllm
from doc_tables import REGISTERED, documented, families_table
from families import FAMILIES, OTHER_FAMILIES, config_of
from transformers.models.auto import modeling_auto
from vllm.model_executor.models.registry import ModelRegistry

from vllm_expert_prefetch.serving.refusals import REFUSALS

TABLE = json.loads(REGISTERED.read_text())
KNOWN = TABLE["models"]
REFUSED = {refusal.what for refusal in REFUSALS} | {"none of the model's layers uses vLLM's RoutedExperts"}
MODELS = {name: (model.module_name, model.class_name) for name, model in ModelRegistry.models.items()}
MAKERS = {"FusedMoEFactory", "fused_experts"}
PACKAGES = ("vllm.model_executor.models", "vllm.models")


@functools.cache
def names_in(module):
    """Of each definition at the top of a module, the words in it; of each name, where it is imported from.

    By pattern: Python's parser finds the same, in nine times the time.
    """
    path = Path(vllm.__file__).parents[1].joinpath(*module.split("."))
    package = module if path.is_dir() else module.rpartition(".")[0]
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    definitions, imports = {}, {}
    code = re.sub(r'"""(.|\n)*?"""|#.*|"[^"\n]*[^"\n\w][^"\n]*"', "", source)
    for name, rest in re.findall(r"^(?:class |def |(?=\w+ *[:=]))(\w+)((?:.*\n(?![^\s)\]}]))*.*)", code, re.MULTILINE):
        definitions.setdefault(name, set()).update(re.findall(r"\w+", rest))
    for dots, origin, names in re.findall(r"^ *from (\.*)([\w.]*) import (\([^)]*\)|.*)", code, re.MULTILINE):
        origin = importlib.util.resolve_name(dots + origin, package)
        for name, new_name in re.findall(r"(\w+)(?: as (\w+))?", names):
            imports.setdefault(new_name or name, set()).add((origin, name))
    return definitions, imports


@functools.cache
def named_by(module, name):
    """The definitions in vLLM's models that the one of this name uses, and whether it makes routed experts."""
    if not module.startswith(PACKAGES):
        return set(), False
    definitions, imports = names_in(module)
    used = definitions.get(name, set())
    found = {(module, other) for other in used if other in definitions or other in imports} | imports.get(name, set())
    return found | {MODELS[other] for other in used if other in MODELS}, bool(used & MAKERS)


def moe_blocks(module, name):
    """The definitions below a model's class that make routed experts."""
    seen, todo = set(), [(module, name)]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo.extend(named_by(*current)[0])
    return {current for current in seen if named_by(*current)[1]}


def resolved(name):
    """vLLM's class for a family's checkpoint, or None: Transformers' own model then serves it."""
    config = config_of(name)
    kinds = (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    named = config.architectures or [kind[config.model_type] for kind in kinds if config.model_type in kind]
    return MODELS.get(named[0])


@pytest.fixture(scope="module")
def blocks():
    """Every registered model that has routed experts, and what makes them."""
    return {name: found for name, model in MODELS.items() if (found := moe_blocks(*model))}


def test_the_table_is_of_the_installed_vllm_and_names_its_models(blocks):
    assert vllm.__version__.startswith(TABLE["vllm"])
    assert set(blocks) == set(KNOWN)


def test_what_is_known_is_of_a_kind_and_names_what_there_is():
    for name, known in KNOWN.items():
        kind, _, what = known.partition(": ")
        if kind == "refused":
            assert what in REFUSED, name
        elif kind in ("stock", "not tried", "left to vLLM"):
            assert what, name
        elif kind != "by hand":
            assert re.sub("^(covered by|as) ", "", known) in FAMILIES | OTHER_FAMILIES, name


def test_a_family_covers_the_model_that_its_checkpoint_names_and_those_with_the_same_experts(blocks):
    tested = {known.removeprefix("covered by "): name for name, known in KNOWN.items() if known.startswith("covered")}
    dense = {name for name, family in FAMILIES.items() if not family.num_experts}
    for family in (FAMILIES | OTHER_FAMILIES).keys() - dense:
        assert resolved(family) == MODELS.get(tested.get(family)), family
    for name, known in KNOWN.items():
        if known.startswith("as "):
            assert blocks[name] <= blocks[tested[known.removeprefix("as ")]], name


def test_the_documentation_shows_the_table():
    assert documented("families") == families_table(), "python tests/doc_tables.py brings it up to date"
