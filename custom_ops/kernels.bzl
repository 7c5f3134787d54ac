"""CPU kernels that are compiled once for each instruction set and chosen at run time."""

def cpu_kernels(name, srcs, hdrs, variants, variant_src, deps):
    """A library of kernels.

    Args:
      name: of the library.
      srcs: sources for the baseline instruction set: what chooses among the variants.
      hdrs: headers of all.
      variants: compiler flags of each variant.
      variant_src: a variant's source, with {} for its name.
      deps: what all of them need.
    """
    native.cc_library(
        name = name + "_headers",
        hdrs = hdrs,
        deps = deps,
    )
    for variant, flags in variants.items():
        native.cc_library(
            name = name + "_" + variant,
            srcs = [variant_src.format(variant)],
            copts = flags,
            deps = [":" + name + "_headers"],
            alwayslink = True,
        )
    native.cc_library(
        name = name,
        srcs = srcs,
        deps = [":" + name + "_headers"] + [":" + name + "_" + variant for variant in variants],
    )
