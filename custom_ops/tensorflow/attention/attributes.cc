// Reads and checks the attributes of the attention op.
#include "custom_ops/tensorflow/attention/attributes.h"

#include <cmath>
#include <limits>

#include "tensorflow/core/platform/errors.h"

namespace stf {
namespace {

using tensorflow::errors::InvalidArgument;

constexpr int kFormat = 2;           // the latest
constexpr int kRecord = 6;           // integers of a component
constexpr int kMostComponents = 63;  // of a head: `exclude` has a bit for each
// Of a parameter, so that no sum or product with a tile's size overflows.
constexpr int64_t kLargest = std::numeric_limits<int64_t>::max() / 4096;

// A list attribute's value for a message; the first few of many.
std::string Listed(const std::vector<int64_t>& values) {
  std::string listed = "[";
  for (size_t i = 0; i < values.size() && i < 16; i++) listed += (i ? ", " : "") + std::to_string(values[i]);
  return listed + (values.size() > 16 ? ", ...]" : "]");
}

absl::Status CheckComponent(const stf_component& c, int index) {
  auto invalid = [index](const char* rule, const char* name, int64_t value) {
    return InvalidArgument("components: ", rule, ". Received: ", name, "=", value, " in component ", index);
  };
  if (c.kind < STF_CAUSAL || c.kind > STF_COLUMNS) return invalid("kind must be from 0 to 6", "kind", c.kind);
  if (c.kind != STF_CAUSAL && c.kind != STF_LOCAL && c.a < 1) return invalid("stride must be at least 1", "stride", c.a);
  if (c.kind == STF_LOCAL && c.a < 0) return invalid("window must be at least 0", "window", c.a);
  for (const int64_t parameter : {c.a, c.b, c.c, c.d}) {
    if (parameter < 0 || parameter > kLargest) return invalid("parameters must not be negative or huge", "parameter", parameter);
  }
  if (c.kind == STF_STRIDED && c.b > kLargest / c.a) return invalid("first distance must not be huge", "b", c.b);
  if (c.kind == STF_SUMMARY || c.kind == STF_COLUMNS) {
    if (c.c > c.a) return invalid("summary must not be larger than stride", "end column", c.c);
    if (c.b >= c.c) return invalid("summary must have a column", "begin column", c.b);
  }
  if (c.kind == STF_BLOCKS && c.c < 1) return invalid("a layout must have a block", "blocks", c.c);
  if ((c.kind == STF_OWN_BLOCK || c.kind == STF_BLOCKS) && c.d > 1)
    return invalid("blocks count from the sequence (0) or from the document (1)", "d", c.d);
  return absl::OkStatus();
}

}  // namespace

absl::Status Program::Init(tensorflow::OpKernelConstruction* context) {
  std::vector<int64_t> records, bounds;
  tensorflow::tstring layouts;
  int64_t format;
  TF_RETURN_IF_ERROR(context->GetAttr("format", &format));
  if (format < 1 || format > kFormat)
    return InvalidArgument("format must be from 1 to ", kFormat,
                           ", those that this stf reads: another version of it has written the graph. Received: format=", format);
  TF_RETURN_IF_ERROR(context->GetAttr("layouts", &layouts));
  if (!layouts.empty())
    return InvalidArgument(
        "layouts must be empty: a graph with block layouts of format 1 is not read any more, make it anew from the model. "
        "Received: layouts of ",
        layouts.size(), " bytes");
  TF_RETURN_IF_ERROR(context->GetAttr("components", &records));
  TF_RETURN_IF_ERROR(context->GetAttr("program_begin", &bounds));
  TF_RETURN_IF_ERROR(context->GetAttr("scale", &scale));
  if (!std::isfinite(scale)) return InvalidArgument("scale must be finite. Received: scale=", scale);
  if (records.size() % kRecord != 0)
    return InvalidArgument("components must be records of ", kRecord, " integers. Received: ", records.size(), " integers");
  const int64_t count = records.size() / kRecord;
  for (int64_t i = 0; i < count; i++) {
    const int64_t* r = &records[i * kRecord];
    components.push_back({r[0], r[1], r[2], r[3], r[4], r[5]});
    TF_RETURN_IF_ERROR(CheckComponent(components.back(), i));
  }
  if (bounds.empty() || bounds.front() != 0 || bounds.back() != count)
    return InvalidArgument("program_begin must run from 0 to the number of components, ", count, ". Received: ", Listed(bounds));
  for (size_t p = 0; p + 1 < bounds.size(); p++) {
    // Compared, not subtracted: neither may be a number that a difference overflows with.
    if (bounds[p + 1] < bounds[p] || bounds[p + 1] > count || bounds[p + 1] > bounds[p] + kMostComponents)
      return InvalidArgument("program_begin must grow by 0 to ", kMostComponents, ", up to the number of components, ", count,
                             ". Received: ", Listed(bounds));
    for (int64_t i = bounds[p]; i < bounds[p + 1]; i++) {
      const int64_t exclude = components[i].exclude;
      if (exclude < 0 || exclude >> (i - bounds[p]) != 0)
        return InvalidArgument("components: exclude must name earlier components of the head. Received: exclude=", exclude,
                               " in component ", i);
    }
  }
  begin.assign(bounds.begin(), bounds.end());
  return absl::OkStatus();
}

absl::Status Program::CheckLayouts(int64_t bytes, int64_t positions) const {
  const int64_t bits = 8 * bytes;
  if (positions == 0) return absl::OkStatus();  // nothing to lay out
  for (const stf_component& c : components) {
    if (c.kind != STF_BLOCKS) continue;
    if (c.c > (int64_t{1} << 24) || c.b > bits || c.c * c.c > bits - c.b)
      return InvalidArgument("layout_bits must hold ", c.c, " x ", c.c, " bits from bit ", c.b, " on. Received: ", bytes, " bytes");
    const int64_t blocks = positions / c.a + (positions % c.a != 0);
    if (c.c != blocks)
      return InvalidArgument("layout must have ceil(positions / block_size) = ", blocks, " blocks for ", positions,
                             " positions. Received: a layout of ", c.c, " x ", c.c, " blocks");
  }
  return absl::OkStatus();
}

}  // namespace stf
