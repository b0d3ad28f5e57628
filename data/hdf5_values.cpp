// The half of Hdf5Structure that tells what stands in a file: attributes, types, shapes, texts and where a
// dataset lies. After the "HDF5 File Format Specification Version 3.0"; the sections' letters stand beside
// what they describe.

#include <algorithm>

#include "data/hdf5_cursor.h"
#include "kernels/core/check.h"

namespace upmoe {

using namespace hdf5;

namespace {

constexpr int kMostHeapObjects = 1 << 16;
constexpr const char* kElsewhere =
    " must be stored contiguously in this file (it is chunked, virtual, compact or external)";

}  // namespace

std::uint64_t Hdf5Structure::Space::elements() const {
  if (is_null) return 0;
  std::uint64_t product = 1;
  for (const std::uint64_t n : dims)
    if (__builtin_mul_overflow(product, n, &product)) return kUndefined;
  return product;
}

// IV.A.2.m
void Hdf5Structure::read_attribute(const Message& message) {
  Cursor at(*this, message.data);
  const std::uint64_t version = at.number(1), flags = at.number(1);
  if (message.shared || version < 1 || version > 3) return;  // not one of ours
  const std::uint64_t name_bytes = at.number(2), type_bytes = at.number(2), space_bytes = at.number(2);
  if (version == 3) at.skip(1);
  const auto part = [&](std::uint64_t size) {
    const std::string taken(at.take(size));
    if (version == 1) at.skip((8 - size % 8) % 8);
    return taken;
  };
  const std::string name = part(name_bytes);
  const std::string type = part(type_bytes), space = part(space_bytes);
  if (version > 1 && (flags & 3u) != 0) return;  // its type lies in another object
  attributes_.insert({name.c_str(), {type_of(type), space_of(space), at.rest()}});
}

// IV.A.2.d
Hdf5Type Hdf5Structure::type_of(const std::string& data) const {
  Cursor at(*this, data);
  Hdf5Type type;
  const std::uint64_t kind = at.number(1) & 15u, bits = at.number(3);
  type.bytes = at.number(4);
  if (kind == 0) {
    type.kind = Hdf5Type::Kind::kInteger;
    type.little_endian = (bits & 1u) == 0;
    type.is_signed = (bits & 8u) != 0;
    const std::uint64_t first = at.number(2), precision = at.number(2);
    type.whole = first == 0 && precision == type.bytes * 8;
  } else if (kind == 3) {
    type.kind = Hdf5Type::Kind::kText;
  } else if (kind == 9 && (bits & 15u) == 1) {
    type.kind = Hdf5Type::Kind::kVariableText;
  }
  return type;
}

// IV.A.2.b
Hdf5Structure::Space Hdf5Structure::space_of(const std::string& data) const {
  Cursor at(*this, data);
  Space space;
  const std::uint64_t version = at.number(1), rank = at.number(1);
  if (version < 1 || version > 2 || rank > 32) damaged("a shape is of an unknown version");
  at.skip(1);
  if (version == 2) {
    space.is_null = at.number(1) == 2;
  } else {
    at.skip(5);
  }
  for (std::uint64_t i = 0; i < rank; ++i) space.dims.push_back(at.number(8));
  return space;
}

void Hdf5Structure::refuse(const char* what, const std::string& name, const std::string& why) const {
  fail(ExitCode::kBadInput, "{}: {} '{}'{}", file_.path().string(), what, name, why);
}

const Hdf5Structure::Attribute& Hdf5Structure::attribute(const std::string& name) const {
  const auto it = attributes_.find(name);
  if (it == attributes_.end())
    refuse("attribute", name,
           dense_attributes_ ? " is not among those stored directly; give the file fewer attributes"
                             : " is missing; the format is upmoe-tokens-1");
  if (it->second.space.elements() != 1) refuse("attribute", name, ": expected one value");
  return it->second;
}

std::int64_t Hdf5Structure::integer(const std::string& name) const {
  const Attribute& a = attribute(name);
  const std::uint64_t n = a.type.bytes;
  if (a.type.kind != Hdf5Type::Kind::kInteger || !a.type.whole || !a.type.little_endian ||
      (n != 1 && n != 2 && n != 4 && n != 8))
    refuse("attribute", name, ": expected a whole number");
  const std::uint64_t value = Cursor(*this, a.data).number(n);
  const bool top = (value >> (n * 8 - 1)) != 0;
  if (n == 8 && top && !a.type.is_signed) refuse("attribute", name, fmt::format(" is {}", value));
  // Negative numbers of fewer than 8 bytes get their sign in the bytes above.
  const std::uint64_t sign = n < 8 && top && a.type.is_signed ? ~std::uint64_t{0} << (n * 8) : 0;
  return static_cast<std::int64_t>(value | sign);
}

std::string Hdf5Structure::text(const std::string& name) const {
  const Attribute& a = attribute(name);
  if (a.type.kind == Hdf5Type::Kind::kVariableText) return heap_text(a.data);
  if (a.type.kind != Hdf5Type::Kind::kText) refuse("attribute", name, ": expected a text");
  if (a.type.bytes > kLongestText)
    refuse("attribute", name, fmt::format(" has {} bytes, at most {} are read", a.type.bytes, kLongestText));
  const std::string value(Cursor(*this, a.data).take(a.type.bytes));
  return value.substr(0, std::min(value.find('\0'), value.find_last_not_of(' ') + 1));
}

// III.E: texts of variable length lie in collections of numbered objects.
std::string Hdf5Structure::heap_text(const std::string& reference) const {
  Cursor at(*this, reference);
  const std::uint64_t length = at.number(4), address = at.number(8), index = at.number(4);
  if (length == 0) return "";
  if (length > kLongestText) damaged("a text is too long");
  const std::string start = bytes(address, 16);
  Cursor head(*this, start);
  if (head.take(4) != "GCOL") damaged("a text is missing");
  head.skip(4);
  const std::uint64_t collection = head.number(8);
  std::uint64_t place = 16;
  for (int i = 0; i < kMostHeapObjects && place + 16 <= collection; ++i) {
    const std::string object = bytes(address + place, 16);
    Cursor o(*this, object);
    const std::uint64_t found = o.number(2);
    o.skip(6);
    const std::uint64_t size = o.number(8);
    if (found == index && index != 0) {
      if (size < length) break;
      const std::string value = bytes(address + place + 16, length);
      return value.substr(0, value.find('\0'));
    }
    if (found == 0 || size > collection) break;
    place += 16 + (size + 7) / 8 * 8;
  }
  damaged("a text is missing");
}

Hdf5Structure::Extent Hdf5Structure::contiguous(const std::string& dataset, std::uint64_t element_bytes,
                                                bool is_signed) const {
  const auto link = links_.find(dataset);
  if (link == links_.end()) refuse("dataset", dataset, " is missing; the format is upmoe-tokens-1");
  if (!link->second.hard) refuse("dataset", dataset, " is a link to another place, which is not followed");
  const Message *type_message = nullptr, *space_message = nullptr, *layout = nullptr;
  const std::vector<Message> messages = messages_of(link->second.header);
  for (const Message& m : messages) {
    if (m.type == kDatatype) type_message = &m;
    if (m.type == kDataspace) space_message = &m;
    if (m.type == kLayout) layout = &m;
    if (m.type == kExternalFiles || m.type == kFilters) refuse("dataset", dataset, kElsewhere);
  }
  if (type_message == nullptr || space_message == nullptr || layout == nullptr || type_message->shared ||
      space_message->shared)
    refuse("dataset", dataset, " is not a dataset with a type and a shape of its own");
  const Hdf5Type type = type_of(type_message->data);
  if (type.kind != Hdf5Type::Kind::kInteger || !type.whole || !type.little_endian ||
      type.bytes != element_bytes || type.is_signed != is_signed)
    refuse("dataset", dataset,
           fmt::format(": expected {}-bit {} little-endian numbers", element_bytes * 8,
                       is_signed ? "signed" : "unsigned"));
  const Space space = space_of(space_message->data);
  if (space.is_null || space.dims.size() != 1) refuse("dataset", dataset, ": expected one dimension");
  const std::uint64_t length = space.elements();
  if (length == 0) refuse("dataset", dataset, " is empty");
  Cursor at(*this, layout->data);
  const std::uint64_t version = at.number(1), kind = at.number(1);
  if ((version != 3 && version != 4) || kind != 1) refuse("dataset", dataset, kElsewhere);
  const std::uint64_t address = at.number(8), room = file_bytes_ - base_;
  if (address == kUndefined || address > room || length > (room - address) / element_bytes)
    refuse(
        "dataset", dataset,
        fmt::format(" of {} elements does not fit into the file's {} bytes; the file is truncated or damaged",
                    length, file_bytes_));
  return {base_ + address, static_cast<std::int64_t>(length)};
}

}  // namespace upmoe
