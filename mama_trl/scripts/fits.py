"""Whether options fit a model, found from its config.json alone: before weights are loaded or tokens measured."""

from ..config import PruningOptions


def check_fits_source(source: str, options: PruningOptions, trust_remote_code: bool = False) -> None:
    """Raises `MamaError` for module names that match nothing, or a pattern or sparsity that a matrix cannot have."""
    from ..evaluation.loading import load_config, local_folder
    from ..evaluation.weights import sketch
    from ..model.fits import check_fits
    from ..model.targets import find_targets

    if local_folder(source) is None:
        return
    config = load_config(source, trust_remote_code)
    if trust_remote_code and hasattr(config, "auto_map"):
        return  # only its own code knows its matrices
    model = sketch(source, config)
    check_fits(find_targets(model, options.target_modules, options.exclude_modules, experts=True), options)
