"""Drawing for the notebooks: the plane with its points, densities and arrows; strips of images."""
import matplotlib.pyplot as plt
import torch
from einops import rearrange
from mixture import same

COLOURS = ["#d55e00", "#0072b2", "#009e73"]  # one for each class, chosen to be told apart by everybody (Okabe and Ito)

plt.rcParams.update({"figure.dpi": 72, "figure.constrained_layout.use": True, "axes.titlesize": "medium",
                     "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})


def planes(*titles, limit=1.7):
    """A row of pictures of the same part of the plane, one for each title. Returns their axes."""
    side = min(3.3, 12.5 / len(titles))
    _, axes = plt.subplots(1, len(titles), figsize=(side * len(titles), side + 0.2), sharey=True, squeeze=False)
    for panel, title in zip(axes[0], titles):
        panel.set(title=title, xlabel="$x_1$", aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit),
                  xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    axes[0, 0].set_ylabel("$x_2$")
    return axes[0]


def grid(axes, n):
    """n x n points (n * n, 2, 1, 1) that cover the axes."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    margin = (right - left) / (2 * n)
    rows, columns = torch.linspace(bottom + margin, top - margin, n), torch.linspace(left + margin, right - margin, n)
    return rearrange(torch.cartesian_prod(rows, columns).flip(1), "b d -> b d 1 1")


def draw_points(axes, x, c=None, size=5, **style):
    """Points (B, 2, 1, 1), in the colours of their labels c (B,)."""
    colours = "black" if c is None else [COLOURS[k] for k in c.tolist()]
    axes.scatter(*x.detach().flatten(1).T, s=size, c=colours, linewidths=0, **style)


@torch.no_grad()
def draw_density(axes, mixture, t, c, colour="0.5"):
    """Lines of equal density p_t(x | c); each is a third as dense as the next one inwards."""
    x = grid(axes, 80)
    log_density = mixture.log_density(x, same(t, x), same(c, x)).view(80, 80)
    levels = log_density.max() - 1.1 * torch.arange(4, 0, -1)
    side = x[:80, 0, 0, 0]
    axes.contour(side, side, log_density, levels=levels, colors=colour, linewidths=0.8, linestyles="solid")


@torch.no_grad()
def draw_field(axes, field, n=17, colour="black"):
    """Arrows of a field, a function (B, 2, 1, 1) -> (B, 2, 1, 1). They show the direction; long ones are shortened."""
    x = grid(axes, n)
    arrows = field(x).flatten(1)
    length = arrows.norm(dim=1, keepdim=True)
    arrows = arrows / (length + length.median()) * (axes.get_xlim()[1] - axes.get_xlim()[0]) / n * 1.3
    axes.quiver(*x.flatten(1).T, *arrows.T, angles="xy", scale_units="xy", scale=1, width=0.005, color=colour)


def draw_arrows(axes, start, end, c, scale=1.0):
    """An arrow from each start to each end (B, 2, 1, 1), `scale` times its true length, in the colours of labels c."""
    way = (end - start).detach().flatten(1) * scale
    axes.quiver(*start.detach().flatten(1).T, *way.T, angles="xy", scale_units="xy", scale=1, width=0.006,
                color=[COLOURS[k] for k in c.tolist()])


def draw_paths(axes, frames, c):
    """The way of each point through frames (N, B, 2, 1, 1), in the colours of labels c (B,); a dot where it ends."""
    for path, k in zip(frames.flatten(2).unbind(1), c.tolist()):
        axes.plot(*path.T, color=COLOURS[k], linewidth=0.7, alpha=0.8)
    draw_points(axes, frames[-1], c, 14, zorder=3)


def strip(rows, left, top=(), title="", width=8.0):
    """Images as a table. rows: a list of images (N, 1, H, W) in [-1, 1]; left: a word a row; top: a word a column."""
    rows = torch.stack(list(rows)).clamp(-1, 1)  # (R, N, 1, H, W)
    R, N, _, H, W = rows.shape
    _, axes = plt.subplots(figsize=(width, width * R / N + 0.3 + 0.3 * bool(title)))
    axes.imshow(rearrange(rows, "r n 1 h w -> (r h) (n w)"), cmap="gray", vmin=-1, vmax=1)
    axes.set(title=title, aspect="equal")
    axes.set_yticks([H * (r + 0.5) for r in range(R)], left)
    axes.set_xticks([W * (n + 0.5) for n in range(len(top))], top)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
