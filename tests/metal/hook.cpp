// Reports every primitive that MLX puts into a graph, at the moment it is put there.
//
// This library is loaded before mlx.core with RTLD_GLOBAL, so its definitions of two functions replace those of libmlx:
// the constructor of a graph's nodes (used by every operation, inside mx.compile, in gradients and in other packages'
// layers too), and the function that resolves the `stream=` argument.  Both do what the originals do, then report.
// A node's description is reported once a thread; the callback may ask to hear of the same description again.
#include <cstdint>
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
thread_local std::unordered_set<std::uint64_t> known;  // what this thread has reported
thread_local bool reporting = false;  // a callback may make arrays of its own
thread_local std::string details;

void add(const char* key, int value) {
  details += key;
  details += '=';
  details += std::to_string(value);
  details += ' ';
}

void add_quantisation(int group, int bits, mx::QuantizationMode mode) {
  add("group", group);
  add("bits", bits);
  details += "mode=";
  switch (mode) {
    case mx::QuantizationMode::Affine:
      details += "affine ";
      break;
    case mx::QuantizationMode::Mxfp4:
      details += "mxfp4 ";
      break;
    case mx::QuantizationMode::Mxfp8:
      details += "mxfp8 ";
      break;
    case mx::QuantizationMode::Nvfp4:
      details += "nvfp4 ";
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

std::uint64_t mixed(std::uint64_t hash, std::uint64_t value) {
  return (hash ^ value) * 1099511628211u;  // FNV-1a
}

std::uint64_t key_of(const mx::array& node) {
  std::uint64_t key = 14695981039346656037u;
  for (const char* c = node.primitive().name(); *c != 0; ++c) {
    key = mixed(key, *c);
  }
  key = mixed(key, 1 + static_cast<int>(node.dtype().val()));
  for (const auto& input : node.inputs()) {
    key = mixed(key, 1 + static_cast<int>(input.dtype().val()));
  }
  for (const char c : details) {
    key = mixed(key, c);
  }
  return key;
}

std::string description_of(const mx::array& node) {
  std::string text = node.primitive().name();
  text += '|';
  text += name_of(node.dtype());
  text += '|';
  for (const auto& input : node.inputs()) {
    text += name_of(input.dtype());
    text += ' ';
  }
  return text + '|' + details;
}

void report(const mx::array& node) {
  details.clear();
  add_details(node.primitive(), node.inputs());
  const auto key = key_of(node);
  if (known.count(key) != 0) {
    return;
  }
  reporting = true;
  if (on_node(description_of(node).c_str()) == 0) {
    known.insert(key);
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
