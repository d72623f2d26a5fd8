"""Every name of vLLM that the plugin touches, and whether a vLLM has it: read in its source files, nothing is imported.

A release of vLLM is supported when all of them are there (docs/compatibility.md). What is used through `getattr` with a
default, because only some releases have it, does not stand here.
"""

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

FOUND, MISSING = "found", "missing"

_LAYERS = "model_executor.layers."
_MOE = f"{_LAYERS}fused_moe."
_LOADER = "model_executor.model_loader."

SEAMS = f"""
version:__version__
logger:init_logger
envs:VLLM_USE_BREAKABLE_CUDAGRAPH
platforms:current_platform
platforms.interface:Platform.pre_register_and_update(parser)
platforms.interface:Platform.check_and_update_config(vllm_config)
platforms.interface:Platform.is_cpu()
platforms.interface:Platform.is_cuda()
platforms.interface:Platform.get_device_capability
utils.torch_utils:STR_DTYPE_TO_TORCH_DTYPE
forward_context:get_forward_context()
forward_context:is_forward_context_available()
forward_context:ForwardContext.attn_metadata
forward_context:ForwardContext.slot_mapping
forward_context:ForwardContext.no_compile_layers
distributed.parallel_state:get_world_group()
distributed.parallel_state:get_tp_group()
distributed.parallel_state:get_pp_group()
distributed.utils:get_pp_indices(num_hidden_layers, pp_rank, pp_size)
distributed.parallel_state:GroupCoordinator.cpu_group
distributed.parallel_state:GroupCoordinator.local_rank
distributed.parallel_state:GroupCoordinator.world_size
distributed.parallel_state:cleanup_dist_env_and_memory()
config:get_current_vllm_config()
config.vllm:VllmConfig.additional_config
config.vllm:VllmConfig.kernel_config
config.vllm:VllmConfig.weight_transfer_config
config.kernel:KernelConfig.moe_backend
config.quantization:_ONLINE_SHORTHANDS
config.model:ModelConfig.get_num_experts()
config.model:ModelConfig.get_num_kv_heads
config.model:ModelConfig.get_num_layers
config.model:ModelConfig.get_head_size
config.model:ModelConfig.get_hidden_size
config.model:ModelConfig.get_vocab_size
config.model:ModelConfig.use_mla
config.model:ModelConfig.max_model_len
config.model:ModelConfig.enable_sleep_mode
config.model:ModelConfig.served_model_name
config.model:ModelConfig.quantization
config.model:ModelConfig.hf_config
config.model:ModelConfig.hf_text_config
config.cache:CacheConfig.gpu_memory_utilization
config.cache:CacheConfig.kv_cache_memory_bytes
config.cache:CacheConfig.cache_dtype
config.load:LoadConfig.load_format
config.load:LoadConfig.download_dir
config.offload:OffloadConfig.uva
config.offload:OffloadConfig.prefetch
config.offload:OffloadConfig.offload_backend
config.scheduler:SchedulerConfig.max_num_batched_tokens
config.scheduler:SchedulerConfig.max_num_seqs
config.scheduler:SchedulerConfig.enable_chunked_prefill
config.scheduler:SchedulerConfig.long_prefill_token_threshold
config.scheduler:SchedulerConfig.scheduler_cls
config.speculative:SpeculativeConfig.draft_model_config
config.speculative:SpeculativeConfig.target_model_config
config.parallel:ParallelConfig.enable_expert_parallel
config.parallel:ParallelConfig.enable_eplb
config.parallel:ParallelConfig.enable_elastic_ep
config.parallel:ParallelConfig.enable_dbo
config.parallel:ParallelConfig.ubatch_size
config.parallel:ParallelConfig.data_parallel_size
config.parallel:ParallelConfig.data_parallel_rank
config.parallel:ParallelConfig.pipeline_parallel_size
config.parallel:ParallelConfig.tensor_parallel_size
config.parallel:ParallelConfig.prefill_context_parallel_size
config.parallel:ParallelConfig.decode_context_parallel_size
config.parallel:ParallelConfig.distributed_executor_backend
config.parallel:ParallelConfig.local_world_size
config.parallel:ParallelConfig.rank
model_executor.custom_op:op_registry_oot
model_executor.custom_op:PluggableLayer.register_oot
model_executor.offloader.base:get_offloader()
model_executor.offloader.base:set_offloader(instance)
model_executor.offloader.base:NoopOffloader
model_executor.offloader.base:BaseOffloader.sync_prev_onload()
model_executor.offloader.base:BaseOffloader.join_after_forward()
{_LOADER}base_loader:BaseModelLoader.load_model(vllm_config, model_config)
{_LOADER.rstrip(".")}:_LOAD_FORMAT_TO_MODEL_LOADER
{_LAYERS}mamba.abstract:MambaBase
{_LAYERS}attention_layer_base:AttentionLayerBase
config.compilation:CompilationConfig.static_forward_context
{_MOE}routed_experts:RoutedExperts.forward_modular(x, topk_weights, topk_ids, shared_experts, shared_experts_input)
{_MOE}routed_experts:RoutedExperts.weight_loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success)
{_MOE}routed_experts:RoutedExperts.load_weights
{_MOE}routed_experts:RoutedExperts.layer_name
{_MOE}routed_experts:RoutedExperts.top_k
{_MOE}routed_experts:RoutedExperts.local_num_experts
{_MOE}routed_experts:RoutedExperts.expert_map
{_MOE}routed_experts:RoutedExperts.quant_method
{_MOE}routed_experts:RoutedExperts.moe_config
{_MOE}fused_moe_method_base:FusedMoEMethodBase.apply(layer, x, topk_weights, topk_ids)
{_MOE}fused_moe_method_base:FusedMoEMethodBase.is_monolithic
{_MOE}fused_moe_method_base:FusedMoEMethodBase.topk_indices_dtype
{_MOE}config:FusedMoEConfig.in_dtype
{_MOE}config:FusedMoEConfig.is_lora_enabled
{_MOE}experts.marlin_moe:moe_align_block_size
{_MOE}runner.moe_runner:MoERunner.routed_experts
{_MOE}runner.moe_runner:MoERunner.router
{_MOE}runner.moe_runner:MoERunner.gate
{_MOE}router.base_router:BaseRouter.top_k
{_MOE}router.fused_topk_router:FusedTopKRouter.renormalize
{_MOE}router.fused_topk_router:FusedTopKRouter.scoring_func
{_MOE}router.grouped_topk_router:GroupedTopKRouter.num_expert_group
{_MOE}router.grouped_topk_router:GroupedTopKRouter.topk_group
{_MOE}router.grouped_topk_router:GroupedTopKRouter.e_score_correction_bias
lora.model_manager:get_supported_lora_modules(model)
lora.model_manager:LoRAModelManager.supported_lora_modules
lora.worker_manager:WorkerLoRAManager._adapter_manager
lora.worker_manager:WorkerLoRAManager._load_adapter(lora_request)
lora.lora_model:LoRAModel.loras
lora.request:LoRARequest.lora_name
lora.request:LoRARequest.lora_path
v1.core.sched.output:CachedRequestData.num_output_tokens
v1.core.sched.output:CachedRequestData.resumed_req_ids
v1.core.sched.output:SchedulerOutput.scheduled_new_reqs
v1.core.sched.output:SchedulerOutput.scheduled_cached_reqs
v1.core.sched.output:SchedulerOutput.total_num_scheduled_tokens
v1.core.sched.output:SchedulerOutput.num_scheduled_tokens
v1.core.sched.output:SchedulerOutput.finished_req_ids
v1.core.sched.scheduler:Scheduler.schedule
v1.core.sched.scheduler:Scheduler.update_from_output(scheduler_output)
v1.core.sched.scheduler:Scheduler.max_num_scheduled_tokens
v1.core.sched.scheduler:Scheduler.running
v1.core.sched.scheduler:Scheduler.num_spec_tokens
v1.core.sched.scheduler:Scheduler.scheduler_config
v1.request:Request.num_output_tokens
v1.request:Request.spec_token_ids
v1.kv_cache_interface:KVCacheSpec.max_memory_usage_bytes(vllm_config)
v1.kv_cache_interface:KVCacheSpec.page_size_bytes
v1.worker.worker_base:WorkerWrapperBase.init_device
v1.worker.worker_base:WorkerBase.shutdown()
v1.worker.gpu_worker:Worker.determine_available_memory()
v1.worker.gpu_worker:Worker.compile_or_warm_up_model()
v1.worker.gpu_worker:Worker.get_kv_cache_spec()
v1.worker.gpu_worker:Worker.requested_memory
v1.worker.gpu_worker:Worker.peak_activation_memory
v1.worker.gpu_model_runner:GPUModelRunner.execute_model(scheduler_output)
v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens
v1.worker.gpu_model_runner:GPUModelRunner.reload_weights
v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model(model)
v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.lora_manager
v1.worker.gpu.model_runner:GPUModelRunner.execute_model(scheduler_output)
v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens
""".split("\n")[1:-1]
"""module:name, or module:Class.member; with parentheses, the parameters that it must begin with."""


def installed_vllm() -> Path | None:
    """The folder of the vLLM that Python would import."""
    found = importlib.util.find_spec("vllm")
    return None if found is None or found.origin is None else Path(found.origin).parent


def find_seams(vllm: Path) -> dict[str, str]:
    """Each of SEAMS -> FOUND, MISSING, or what its parameters are now. `vllm`: the package's folder."""
    return {seam: _look_for(seam, vllm) for seam in SEAMS}


def files_of_seams() -> list[str]:
    """The files that SEAMS are looked for in, below vLLM's folder: of each module one or the other."""
    modules = {seam.split(":")[0].replace(".", "/") for seam in SEAMS}
    return sorted(module + end for module in modules for end in (".py", "/__init__.py"))


def _look_for(seam: str, vllm: Path) -> str:
    module, _, rest = seam.partition(":")
    name, has_parameters, parameters = rest.partition("(")
    top, _, member = name.partition(".")
    node = _find(_tree(vllm, module), top)
    if isinstance(node, ast.ClassDef) and member:
        node = _member(vllm, module, node, member)
    if node is None:
        return MISSING
    if has_parameters and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        expected = [name for name in parameters.rstrip(")").split(", ") if name]
        now = _parameters(node)
        if now[: len(expected)] != expected:
            return f"({', '.join(now)})"
    return FOUND


@functools.cache
def _tree(vllm: Path, module: str) -> ast.Module | None:
    path = vllm.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.exists():
            return ast.parse(file.read_text())
    return None


def _find(tree: ast.Module | None, name: str) -> ast.AST | None:
    """What binds `name` in a module, be it in a branch; a text that names it where modules make names when asked."""
    nodes = [] if tree is None else list(ast.walk(tree))
    bound = (node for node in nodes if name in _names_bound_by(node))
    named = (node for node in nodes if isinstance(node, ast.Constant) and node.value == name)
    return next(bound, None) or next(named, None)


def _names_bound_by(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for part in ast.walk(target):
                if isinstance(part, ast.Name):
                    yield part.id
                elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                    yield part.attr
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)


def _member(vllm: Path, module: str, node: ast.ClassDef, name: str) -> ast.AST | None:
    """What defines `name` in a class, sets it on `self`, or does so in a base class."""
    own = [part for part in ast.walk(node) if name in _names_bound_by(part)]
    if own:
        return own[0]
    for base in node.bases:
        found = _class(vllm, module, ast.unparse(base).split("[")[0].split(".")[-1])
        inherited = found and _member(vllm, found[0], found[1], name)
        if inherited:
            return inherited
    return None


def _class(vllm: Path, module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """A class of `module`, defined there or imported from another one of vLLM's."""
    node = _find(_tree(vllm, module), name)
    if isinstance(node, ast.ClassDef):
        return module, node
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return _class(vllm, node.module.removeprefix("vllm."), name) if node.module.startswith("vllm") else None
    return None


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]
