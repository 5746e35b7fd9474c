"""Codes what a compiled forward graph hands to its backward graph.

Inductor calls a partitioner on the joint graph of both. This one lets torch's own decide what is saved, after it has
said which operations may run again, and then puts an operator of the codec on either side of what may be coded.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.utils.checkpoint import CheckpointPolicy

from hf_actnn.codec import graphs, inplace, ops
from hf_actnn.errors import message
from hf_actnn.saving import nodes, rows, spread
from hf_actnn.saving.compiled import ENTER, LEAVE, of, warn_of_checkpoint, warn_once
from hf_actnn.saving.identity import LAST, SAMPLE
from hf_actnn.saving.kept import fills_its_memory
from hf_actnn.saving.nodes import call
from hf_actnn.saving.policy import Policy
from hf_actnn.saving.rows import coded_row_length
from hf_actnn.saving.session import Session
from hf_actnn.saving.spread import spread_of

_KEEP, _GIVE_BACK = torch.ops.hf_actnn.keep.default, torch.ops.hf_actnn.give_back.default
_KEEP_MASK, _GIVE_MASK_BACK = torch.ops.hf_actnn.keep_mask.default, torch.ops.hf_actnn.give_mask_back.default

#: Operations by the names they have before they are taken apart; each with its backward function.
_VIEWS = """alias as_strided clone detach expand permute reshape select slice split split_with_sizes squeeze t transpose
 unbind unflatten unsafe_split unsqueeze view _reshape_alias _to_copy _unsafe_view cat stack constant_pad_nd roll flip
 select_backward slice_backward full zeros convert_element_type"""
_PRODUCTS = "mm addmm bmm baddbmm linear matmul convolution mul add sub neg rsub sum mean where dot mv addmv einsum"
_NORMS = """native_layer_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional
 _native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_with_update_functional batch_norm
 cudnn_batch_norm native_group_norm _fused_rms_norm"""
#: Not elu and hardswish: taken apart, one formula is chosen where the bit is set, and it is bounded there alone. A code
#: may lie on the other side.
_SMOOTH = "gelu silu mish sigmoid tanh hardsigmoid softplus"
_BRANCHES = "relu leaky_relu hardtanh threshold"
_ATTENTION = """_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
 _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"""
_OTHER = """native_dropout dropout max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d
 _adaptive_avg_pool2d_backward _low_memory_max_pool_with_offsets _low_memory_max_pool_offsets_to_indices"""


def _with_backward(*names: str) -> frozenset[str]:
    found = [name for line in names for name in line.split()]
    return frozenset(found) | {f"{name}_backward" for name in found}


#: What may read codes: linear in them, or of a bounded derivative (see the rules of eager mode).
CODABLE = _with_backward(_VIEWS, _PRODUCTS, _NORMS, _SMOOTH, _BRANCHES, _ATTENTION, _OTHER)
_OF_NORMS, _OF_ATTENTION = _with_backward(_NORMS), _with_backward(_ATTENTION)
#: What attention adds to its scores, by the names of the argument: exponentiated, and often as good as minus infinity.
_ADDED = ("attn_mask", "attn_bias")
_MAKERS = frozenset(["mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution"]) | _OF_NORMS | _OF_ATTENTION
#: Among samples of images, groups may straddle pixels.
_OF_IMAGES = _with_backward(
    "convolution max_pool2d_with_indices native_group_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm"
    " _native_batch_norm_legit_functional _batch_norm_with_update _batch_norm_with_update_functional"
)
#: What the backward pass computes again, from codes, instead of having it kept.
_RECIPES = frozenset(f"{_SMOOTH} {_NORMS}".split())


class Place(NamedTuple):
    """What a mark said of the module that an operation ran in."""

    session: str
    policy: Policy


class Partitioner(CustomPartitionerFn):
    """Torch's partitioner, or the one that was there before, and codes in graphs that have marks."""

    def __init__(self, before: CustomPartitionerFn | None) -> None:
        self.before = before

    def uuid(self) -> Any:
        """What cached graphs depend on that is not in them: these files, and the process's number in the noise."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        return _fingerprint(), rank, None if self.before is None else self.before.uuid()

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        divide = min_cut_rematerialization_partition if self.before is None else self.before
        places = read_marks(gm.graph)
        if not any(place.policy.bits for place in places.values()):
            return divide(gm, joint_inputs, **kwargs)
        gm.recompile()
        return _Division(gm, places, kwargs).run(divide, joint_inputs)


def install() -> None:
    """Have inductor call :class:`Partitioner`. Graphs without marks are divided as before."""
    before = inductor_config.custom_partitioner_fn
    if not isinstance(before, Partitioner):
        inductor_config.custom_partitioner_fn = Partitioner(before)


def _fingerprint() -> str:
    found = hashlib.sha256(Path(__file__).read_bytes())
    for module in (graphs, ops, inplace, nodes, rows, spread):
        found.update(Path(str(module.__file__)).read_bytes())
    return found.hexdigest()


def read_marks(graph: fx.Graph) -> dict[fx.Node, Place]:
    """The place of each node between marks, the innermost one. The marks are taken out."""
    places: dict[fx.Node, Place] = {}
    stack: list[Place] = []
    for node in list(graph.nodes):
        if node.target is ENTER:
            session, policy = node.args
            stack.append(Place(session, of(policy)))
        elif node.target is LEAVE:
            del stack[-1:]  # its other end may lie in the graph before a break
        else:
            if stack:
                places[node] = stack[-1]
            continue
        graph.erase_node(node)
    return places


def name_of(node: fx.Node) -> str:
    """The operation a node is, or was taken out of."""
    found = node.meta.get("original_aten") or node.target
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # run again with the random state it had
        found = next((arg for arg in node.args if isinstance(arg, torch._ops.OpOverload)), found)
    packet = getattr(found, "overloadpacket", found)
    return getattr(packet, "__name__", str(packet))


def _value(node: fx.Node) -> Tensor | None:
    found = node.meta.get("val")
    return found if isinstance(found, Tensor) else None


def _has_sizes(value: Tensor) -> bool:
    """Whether the sizes are known, or a warning that they are not."""
    if isinstance(value.numel(), int):
        return True
    warn_once(
        "sizes",
        message(
            "what has sizes that vary is kept exactly in compiled graphs",
            where="torch.compile",
            expected="the same shapes in every call",
            received=f"a tensor of shape {tuple(value.shape)}",
            next_step="Drop the last, smaller batch, or compile with dynamic=False, which compiles once more for it",
        ),
    )
    return False


def _descendants(graph: fx.Graph, roots: Iterable[fx.Node]) -> set[fx.Node]:
    found = set(roots)
    for node in graph.nodes:
        if node not in found and any(parent in found for parent in node.all_input_nodes):
            found.add(node)
    return found


def _tangents(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder" and "tangents" in str(node.target)]


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _gives_views(node: fx.Node) -> bool:
    """Whether a node cuts a tensor in several views, or is one of them: torch's partitioner would save these."""
    if node.target is operator.getitem:
        return _gives_views(node.args[0])  # type: ignore[arg-type]
    return _is_view(node) and not isinstance(node.meta.get("val"), Tensor)


class _Division:
    """One joint graph on its way to two."""

    def __init__(self, gm: fx.GraphModule, places: dict[fx.Node, Place], kwargs: dict[str, Any]) -> None:
        self.gm, self.graph, self.kwargs = gm, gm.graph, kwargs
        self.outputs: int = kwargs["num_fwd_outputs"]
        self.gradients = _descendants(gm.graph, _tangents(gm.graph))
        self.places = self._places_of_users(places)
        self.weights = self._from_weights_alone()
        self.exact = self._statistics() | self._added_to_scores()
        self.index = 0

    def run(self, divide: Any, joint_inputs: Sequence[object]) -> tuple[fx.GraphModule, fx.GraphModule]:
        masks = self._tag()
        self._add_outputs(masks)
        # Views of one tensor are made again, or it would be coded once for each.
        with functorch_config.patch(recompute_views=True):
            kwargs = {**self.kwargs, "num_fwd_outputs": self.outputs + len(masks)}
            forward, backward = divide(self.gm, joint_inputs, **kwargs)
        self._remove_outputs(forward, len(masks))
        self._code(forward, backward)
        forward.graph.lint()
        backward.graph.lint()
        forward.recompile()
        backward.recompile()
        return forward, backward

    # -- what is known of the joint graph -----------------------------------------------------------------------------

    def _places_of_users(self, places: dict[fx.Node, Place]) -> dict[str, Place]:
        """By name, the place in which what a node gives is used first, for inputs, or made."""
        found = {node.name: place for node, place in places.items()}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                users = [places[user] for user in node.users if user in places]
                if users:
                    found[node.name] = users[0]
        return found

    def _from_weights_alone(self) -> set[str]:
        """Names of the parameters and buffers, and of what is computed from nothing else."""
        static = set(self.kwargs.get("static_lifetime_input_indices") or ())
        primals = [node for node in self.graph.nodes if node.op == "placeholder" and "tangents" not in str(node.target)]
        data = {node for at, node in enumerate(primals) if at not in static}
        return {node.name for node in self.graph.nodes} - {node.name for node in _descendants(self.graph, data)}

    def _statistics(self) -> set[str]:
        """Names of the means and the like that normalisations take of their input, which are always exact."""
        found: dict[tuple[Any, str], dict[str, int]] = {}
        for node in self.graph.nodes:
            value = _value(node)
            if value is not None and name_of(node) in _OF_NORMS and _has_sizes(value):
                found.setdefault((node.meta.get("seq_nr"), name_of(node)), {})[node.name] = value.numel()
        return {name for sizes in found.values() for name, size in sizes.items() if 2 * size <= max(sizes.values())}

    def _added_to_scores(self) -> set[str]:
        """Names of what attention adds to its scores, and of what that is made of, up to what a layer gives."""
        found: set[fx.Node] = set()
        waiting: list[fx.Node] = []
        for node in self.graph.nodes:
            if name_of(node) in _OF_ATTENTION:
                waiting += [value for value in _arguments(node, _ADDED) if isinstance(value, fx.Node)]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                if name_of(node) not in _MAKERS:
                    waiting += node.all_input_nodes
        return {node.name for node in found}

    def _is_large(self, node: fx.Node) -> bool:
        place, value = self.places.get(node.name), _value(node)
        if place is None or place.policy.bits is None or value is None or node.name in self.weights | self.exact:
            return False
        return _has_sizes(value) and value.numel() >= max(place.policy.min_numel, 1)

    # -- before it is divided -----------------------------------------------------------------------------------------

    def _tag(self) -> list[fx.Node]:
        """Say what runs again and what does not; the bits that choose a branch, which no code may decide, are returned.

        What is rebuilt from codes is an activation, a normalisation with its own statistics, and attention, of which
        nothing that it saved fits the codes of q, k and v. A sum of many codes would add up their errors.
        """
        masks = []
        for node in self.graph.nodes:
            if node.op != "call_function" or node in self.gradients:
                continue
            if "recompute" in node.meta:
                warn_of_checkpoint()
            if self._is_branch(node):
                masks.append(node)
            elif node.name not in self.places or self.places[node.name].policy.bits is None:
                continue
            elif _gives_views(node) or (name_of(node) in _OF_ATTENTION and node.target is not operator.getitem):
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            elif self._is_large(node) and not _is_view(node) and node.target is not operator.getitem:
                again = name_of(node) in _RECIPES
                again = again and not (name_of(node) in _OF_NORMS and self.places[node.name].policy.exact_norms)
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE if again else CheckpointPolicy.MUST_SAVE
        for node in masks:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return masks

    def _is_branch(self, node: fx.Node) -> bool:
        """Whether the backward pass chooses by what a node gives, one bit for each of many values."""
        value = _value(node)
        if value is None or value.dtype is not torch.bool or not any(user in self.gradients for user in node.users):
            return False
        sources = [node, *node.all_input_nodes]
        place = next((self.places[source.name] for source in sources if source.name in self.places), None)
        if place is None or place.policy.bits is None or node.name in self.weights or not _has_sizes(value):
            return False
        self.places.setdefault(node.name, place)
        return value.numel() >= max(place.policy.min_numel, 1)

    def _add_outputs(self, nodes: list[fx.Node]) -> None:
        """Make nodes outputs of the forward pass, so that it computes them."""
        output = self.graph.output_node()
        flat = list(torch.utils._pytree.arg_tree_leaves(*output.args))
        notes = torch.utils._pytree.arg_tree_leaves(output.meta.get("desc", [None] * len(flat)))
        at = self.outputs
        output.args = (flat[:at] + nodes + flat[at:],)
        output.meta["desc"] = notes[:at] + [None] * len(nodes) + notes[at:]

    # -- after it was divided -----------------------------------------------------------------------------------------

    def _remove_outputs(self, forward: fx.GraphModule, count: int) -> None:
        output = forward.graph.output_node()
        values, at = list(output.args[0]), self.outputs  # type: ignore[arg-type]
        output.args = (tuple(values[:at] + values[at + count :]),)
        if "desc" in output.meta:
            notes = list(output.meta["desc"])
            output.meta["desc"] = notes[:at] + notes[at + count :]

    def _code(self, forward: fx.GraphModule, backward: fx.GraphModule) -> None:
        output = forward.graph.output_node()
        values: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        received = {node.name: node for node in backward.graph.nodes if node.op == "placeholder"}
        gradients = _descendants(backward.graph, _tangents(backward.graph))
        steps: dict[tuple[str, torch.device], fx.Node] = {}
        exact = {node for node in values[self.outputs :] if isinstance(node, fx.Node) and not self._is_large(node)}
        for at, node in enumerate(values[self.outputs :], self.outputs):
            if not isinstance(node, fx.Node) or not self._is_large(node):
                continue
            value = _value(node)
            assert value is not None
            if not fills_its_memory(value):
                continue
            if value.dtype is torch.bool:
                values[at] = _code_mask(forward.graph, backward.graph, node, received[node.name])
                continue
            if value.dtype not in ops.FLOATS:
                continue
            readers = _readers(received[node.name], gradients)
            place = self.places[node.name]
            length = _row_length(value, readers, place.policy)
            if length == 0 or not _may_be_coded(readers, place):
                continue
            step = _step(forward.graph, place, value.device, steps)
            seed = ops._signed(Session.named(place.session).key())
            cut = (place.policy.uniform, length, place.policy.group_size)
            how = spread_of(node, place.policy, exact)
            coded, last = node, step if node.op == "placeholder" else node
            if how is not None:
                coded = last = how.normalise(forward.graph, node)
            with forward.graph.inserting_after(last):
                kept = call(forward.graph, _KEEP, coded, list(value.stride()), *cut, seed, self.index, step)
            self.index += 1
            values[at] = kept
            back = _receive(backward.graph, received[node.name], kept, _GIVE_BACK, *cut, *_sizes(value), value.dtype)
            if how is not None:
                how.undo(backward.graph, back, received)
        output.args = (tuple(values),)


def _code_mask(forward: fx.Graph, backward: fx.Graph, node: fx.Node, received: fx.Node) -> fx.Node:
    with forward.inserting_after(node):
        kept = call(forward, _KEEP_MASK, node, list(node.meta["val"].stride()))
    _receive(backward, received, kept, _GIVE_MASK_BACK, *_sizes(node.meta["val"]))
    return kept


def _sizes(value: Tensor) -> tuple[list[int], list[int]]:
    return list(value.shape), list(value.stride())


def _step(
    graph: fx.Graph, place: Place, device: torch.device, steps: dict[tuple[str, torch.device], fx.Node]
) -> fx.Node:
    """The node that numbers the run of a forward graph."""
    if (place.session, device) not in steps:
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            steps[place.session, device] = call(graph, torch.ops.hf_actnn.next_step.default, place.session, device)
    return steps[place.session, device]


def _receive(graph: fx.Graph, received: fx.Node, kept: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Have a backward graph take bytes, and make the tensor of them before it is first used."""
    users = set(received.users)
    received.meta["val"], received.meta["tensor_meta"] = kept.meta["val"], kept.meta["tensor_meta"]
    first = next(node for node in graph.nodes if node in users)
    with graph.inserting_before(first):
        back = call(graph, target, received, *args)
    received.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    return back


def _readers(saved: fx.Node, gradients: set[fx.Node]) -> list[fx.Node]:
    """The nodes of a backward graph that compute with a saved tensor, up to the first gradients made with it."""
    found: dict[fx.Node, None] = {}
    waiting = list(saved.users)
    while waiting:
        node = waiting.pop()
        if node not in found and node.op == "call_function":
            found[node] = None
            if node not in gradients:
                waiting += node.users
    return list(found)


def _may_be_coded(readers: list[fx.Node], place: Place) -> bool:
    for node in readers:
        name = name_of(node)
        if name not in CODABLE and node.target is not operator.getitem:
            return False
        if name in _OF_NORMS and place.policy.exact_norms:
            return False
        if name in _OF_ATTENTION and name.endswith("_backward") and any(map(_is_received, _statistics(node))):
            return False  # its logsumexp has to be that of the codes: computed in this graph
    return True


def _is_received(node: fx.Node) -> bool:
    return node.op == "placeholder" and "tangents" not in str(node.target)


def _arguments(node: fx.Node, wanted: Sequence[str]) -> list[Any]:
    """What an operation is given under these names."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return [given[name] for name in wanted if name in given]


def _statistics(node: fx.Node) -> list[fx.Node]:
    return [value for value in _arguments(node, ("out", "logsumexp")) if isinstance(value, fx.Node)]


def _row_length(value: Tensor, readers: list[fx.Node], policy: Policy) -> int:
    """Groups stay within a sample of an image, and within a token of anything else; 0 where a code would not pay."""
    of_images = value.dim() == 4 and any(name_of(node) in _OF_IMAGES for node in readers)
    rows = SAMPLE if of_images else LAST
    return coded_row_length(value.shape, value.stride(), rows, 0, value.itemsize, policy)
