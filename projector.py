"""The trainable projector between encoder and LLM: Conv1d and two linear layers, as published."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder import attend
from zero3 import gathered


class Conv1dProjector(nn.Module):
    """The published projector (WeSR, after SLAM-ASR), with an output norm of the size of the LLM's own embeddings.

    It may begin with the encoder's last layers, trained: what Whisper's own decoder made of the encoder's output by
    attention, a convolution alone cannot.
    """

    def __init__(
        self, encoder_dim: int, llm_dim: int, stride: int = 5, kernel: int | None = None, hidden: int = 2048
    ) -> None:
        super().__init__()
        self.stride, self.context = stride, (kernel or stride) - stride  # a wider kernel sees frames on both sides
        self.layers, self.layer_norm = nn.ModuleList(), nn.Identity()
        self.conv = nn.Conv1d(encoder_dim, encoder_dim, kernel_size=stride + self.context, stride=stride)
        self.linear1 = nn.Linear(encoder_dim, hidden)
        self.linear2 = nn.Linear(hidden, llm_dim)
        self.norm = nn.RMSNorm(llm_dim)
        self.dropout = 0.0

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        """x (B, E, encoder_dim), of each row `frames` (B,) real → (B, E // stride, llm_dim)."""
        inside = torch.arange(x.shape[1], device=x.device) < frames[:, None]  # (B, E)
        x = attend(self.layers, x.to(self.conv.weight.dtype), inside, self.layer_norm)
        x = F.dropout(x * inside[..., None], self.dropout, self.training)  # a wide kernel would see noise past the end
        x = F.pad(x, (0, 0, self.context // 2, self.context - self.context // 2))
        windows = x.unfold(1, self.stride + self.context, self.stride).flatten(2)  # (B, N, d * kernel)
        # as a product: oneDNN's bfloat16 convolution gave a NaN weight gradient once in some hundred steps
        x = F.relu(F.linear(windows, self.conv.weight.flatten(1), self.conv.bias))  # (B, N, d)
        x = F.relu(self.linear1(F.dropout(x, self.dropout, self.training)))  # (B, N, hidden)
        x = self.linear2(F.dropout(x, self.dropout, self.training))  # (B, N, D)
        return self.norm(x.to(self.norm.weight.dtype))

    def calibrate(self, embedding: nn.Embedding) -> None:
        """Start with outputs whose root mean square is that of the LLM's embedding table."""
        with gathered([embedding.weight]), torch.no_grad():
            self.norm.weight.fill_(embedding.weight.float().square().mean().sqrt())

    def size(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"{count / 1024**2:.2f} M"
