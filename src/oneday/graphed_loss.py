"""The loss of a small model from CUDA graphs: a step of 16 short rows is as long as launching its kernels one by one.

A batch's shape is captured when it is seen for the second time (`torch.cuda.make_graphed_callables`); its forward and
backward pass are then one launch each. Dropout draws anew in every replay. Rows are padded to few lengths
(`choose_pad_multiple`), so that there are few shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from oneday.errors import describe_error

logger = logging.getLogger(__name__)

# Each graph holds the gradients of all parameters: 4 bytes each.
MAX_PARAMETERS = 150_000_000
MAX_GRAPHS = 12
# So many times the bytes of the gradients must be free for a further graph.
ROOM = 3


class ModelLoss(nn.Module):
    """A model's loss as a function of tensors in a fixed order.

    Args:
        model: Its forward pass returns a mapping with `loss`.
        names: Of its forward arguments.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """The loss, a scalar."""
        return self.model(**dict(zip(self.names, tensors, strict=True)))["loss"]


class GraphedLoss:
    """`model(**inputs)["loss"]` in training mode on a CUDA device, replayed where the shapes were seen before.

    A model that cannot be captured (it looks at values on the host) is run as it is, and a warning says so once.

    Args:
        model: In the state in which it is trained; its parameters must stay the same tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graphs: dict[tuple, Callable[..., Tensor]] = {}
        self.seen: set[tuple] = set()
        self.is_possible = True
        self.pool: tuple[int, int] | None = None

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of a batch, with its gradient as autograd's."""
        shapes = tuple((name, tensor.dtype, *tensor.shape) for name, tensor in inputs.items())
        is_due = shapes in self.seen and shapes not in self.graphs
        if self.is_possible and is_due and len(self.graphs) < MAX_GRAPHS and self.has_room():
            self.capture(shapes, inputs)
        self.seen.add(shapes)
        graph = self.graphs.get(shapes)
        return graph(*inputs.values()) if graph else ModelLoss(self.model, tuple(inputs))(*inputs.values())

    def has_room(self) -> bool:
        """Whether the card holds a further graph and leaves as much as its gradients take for passes without one."""
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        gradients = sum(4 * value.numel() for value in self.model.parameters() if value.requires_grad)
        return free > ROOM * gradients

    def capture(self, shapes: tuple, inputs: dict[str, Tensor]) -> None:
        """Enter the graph of these shapes, or give up all graphs."""
        # All graphs share their memory: a backward pass has always been replayed before the next forward pass.
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        samples = tuple(tensor.clone() for tensor in inputs.values())  # they become the graph's own inputs
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        try:
            self.graphs[shapes] = torch.cuda.make_graphed_callables(
                ModelLoss(self.model, tuple(inputs)), samples, allow_unused_input=True, pool=self.pool
            )
        except (RuntimeError, NotImplementedError) as error:
            # The generator would stay one that is being captured.
            generator.graphsafe_set_state(before)
            self.graphs.clear()
            self.is_possible = False
            logger.warning(
                "CUDA graphs are off: %s cannot be captured (%s)", type(self.model).__name__, describe_error(error)
            )
