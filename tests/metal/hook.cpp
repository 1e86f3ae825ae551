// Reports every primitive that MLX puts into a graph, at the moment it is put there.
//
// This library is loaded before mlx.core with RTLD_GLOBAL, so its definitions of two functions replace those of libmlx:
// the constructor of a graph's nodes (used by every operation, inside mx.compile, in gradients and in other packages'
// layers too), and the function that resolves the `stream=` argument.  Both do what the originals do, then report.
// A node's description is reported once; the callback may ask to hear of the same description again.
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_set>

#include "mlx/array.h"
#include "mlx/fast_primitives.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace mx = mlx::core;

namespace {

using NodeCallback = int (*)(const char*);  // returns 1 to hear of this description again
using StreamCallback = void (*)();

NodeCallback on_node = nullptr;
StreamCallback on_cpu_stream = nullptr;
std::mutex mutex;
std::unordered_set<std::string> seen;
thread_local bool reporting = false;  // a callback may make arrays of its own
thread_local std::string text;

void add(const char* key, int value) {
  text += key;
  text += '=';
  text += std::to_string(value);
  text += ' ';
}

void add_quantisation(int group, int bits, mx::QuantizationMode mode) {
  add("group", group);
  add("bits", bits);
  text += "mode=";
  switch (mode) {
    case mx::QuantizationMode::Affine:
      text += "affine ";
      break;
    case mx::QuantizationMode::Mxfp4:
      text += "mxfp4 ";
      break;
    case mx::QuantizationMode::Mxfp8:
      text += "mxfp8 ";
      break;
    case mx::QuantizationMode::Nvfp4:
      text += "nvfp4 ";
      break;
  }
}

const char* name_of(const mx::Dtype& dtype) {
  switch (dtype.val()) {
    case mx::Dtype::Val::bool_:
      return "bool";
    case mx::Dtype::Val::uint8:
      return "uint8";
    case mx::Dtype::Val::uint16:
      return "uint16";
    case mx::Dtype::Val::uint32:
      return "uint32";
    case mx::Dtype::Val::uint64:
      return "uint64";
    case mx::Dtype::Val::int8:
      return "int8";
    case mx::Dtype::Val::int16:
      return "int16";
    case mx::Dtype::Val::int32:
      return "int32";
    case mx::Dtype::Val::int64:
      return "int64";
    case mx::Dtype::Val::float16:
      return "float16";
    case mx::Dtype::Val::float32:
      return "float32";
    case mx::Dtype::Val::float64:
      return "float64";
    case mx::Dtype::Val::bfloat16:
      return "bfloat16";
    case mx::Dtype::Val::complex64:
      return "complex64";
  }
  return "unknown";
}

// What decides on the Metal kernel besides dtypes.
void add_details(const mx::Primitive& p, const std::vector<mx::array>& inputs) {
  const std::string_view name = p.name();  // the classes' type information is not exported
  const int n = static_cast<int>(inputs.size());
  if (name == "QuantizedMatmul") {
    const auto& [group, bits, mode, transpose] = static_cast<const mx::QuantizedMatmul&>(p).state();
    add_quantisation(group, bits, mode);
  } else if (name == "GatherQMM") {
    const auto& state = static_cast<const mx::GatherQMM&>(p).state();
    add_quantisation(std::get<0>(state), std::get<1>(state), std::get<2>(state));
  } else if (name == "Quantize") {
    const auto& [fallback, group, bits, mode, dequantize] = static_cast<const mx::fast::Quantize&>(p).state();
    add_quantisation(group, bits, mode);
    add("dequantize", dequantize ? 1 : 0);
  } else if (name == "Gather") {
    add("indices", n - 1);
  } else if (name == "Scatter") {
    add("indices", n - 2);
  }
}

void report(const mx::array& node) {
  reporting = true;
  text = node.primitive().name();
  text += '|';
  text += name_of(node.dtype());
  text += '|';
  for (const auto& input : node.inputs()) {
    text += name_of(input.dtype());
    text += ' ';
  }
  text += '|';
  add_details(node.primitive(), node.inputs());
  bool is_new;
  {
    std::lock_guard lock(mutex);
    is_new = seen.insert(text).second;
  }
  if (is_new) {
    const std::string description = text;
    if (on_node(description.c_str()) != 0) {
      std::lock_guard lock(mutex);
      seen.erase(description);
    }
  }
  reporting = false;
}

// `stream=mx.cpu`; a device that a program asked for, such as the default one, may be any.
bool names_cpu(const mx::StreamOrDevice& s) {
  return std::holds_alternative<mx::Device::DeviceType>(s) && std::get<mx::Device::DeviceType>(s) == mx::Device::cpu;
}

mx::Stream resolve(const mx::StreamOrDevice& s, const mx::Device& otherwise) {
  if (on_cpu_stream != nullptr && !reporting && names_cpu(s)) {
    on_cpu_stream();
  }
  if (std::holds_alternative<std::monostate>(s)) {
    return mx::default_stream(otherwise);
  }
  if (std::holds_alternative<mx::Device>(s)) {
    return mx::default_stream(std::get<mx::Device>(s));
  }
  if (std::holds_alternative<mx::Device::DeviceType>(s)) {
    return mx::default_stream(std::get<mx::Device::DeviceType>(s));
  }
  if (std::holds_alternative<mx::ThreadLocalStream>(s)) {
    return mx::stream_from_thread_local_stream(std::get<mx::ThreadLocalStream>(s));
  }
  return std::get<mx::Stream>(s);
}

}  // namespace

extern "C" void start_reports(NodeCallback node, StreamCallback cpu_stream) {
  on_node = node;
  on_cpu_stream = cpu_stream;
}

namespace mlx::core {

array::array(Shape shape, Dtype dtype, std::shared_ptr<Primitive> primitive, std::vector<array> inputs)
    : array_desc_(std::make_shared<ArrayDesc>(std::move(shape), dtype, std::move(primitive), std::move(inputs))) {
  if (on_node != nullptr && !reporting && has_primitive()) {
    report(*this);
  }
}

Stream to_stream(StreamOrDevice s) {
  return resolve(s, default_device());
}

Stream to_stream(StreamOrDevice s, Device otherwise) {
  return resolve(s, otherwise);
}

}  // namespace mlx::core
