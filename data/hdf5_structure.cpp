// The half of Hdf5Structure that walks a file: superblock, object headers, groups and links. After the "HDF5
// File Format Specification Version 3.0"; the sections' letters stand beside what they describe.

#include "data/hdf5_structure.h"

#include <algorithm>
#include <cstring>

#include "data/hdf5_cursor.h"
#include "kernels/core/check.h"

namespace upmoe {

using namespace hdf5;

namespace {

constexpr std::uint64_t kLargestBlock = std::uint64_t{1} << 20;  // of headers, names and messages
constexpr int kMostNodes = 1024;
constexpr std::size_t kMostLinks = 4096, kMostMessages = 4096, kMostContinuations = 64;

}  // namespace

void Hdf5Structure::damaged(std::string_view what) const {
  fail(ExitCode::kBadInput,
       "{}: is not a readable HDF5 file ({}): damaged, incomplete, or open for writing elsewhere; make it "
       "anew with data/tokenize.py",
       file_.path().string(), what);
}

std::string Hdf5Structure::bytes(std::uint64_t address, std::uint64_t count) const {
  const std::uint64_t room = file_bytes_ - base_;
  if (address > room || count > room - address) damaged("an address lies behind its end");
  if (count > kLargestBlock) damaged("a part of its description is too long");
  std::string read(static_cast<std::size_t>(count), '\0');
  file_.read(base_ + address, std::as_writable_bytes(std::span(read)));
  return read;
}

// What is walked, from the only fixed place on. Everything else is an address that the file itself gives:
//
//   superblock -> root group's header -> messages -> attribute: its type, shape and value
//                                     |              link: name -> a dataset's header
//                                     |              continuation -> more messages
//                                     -> (older files) symbol table -> tree -> leaves: headers, names in a heap
//
// A damaged file may lead in a circle or claim a billion of anything. So each step is bounded: addresses by the file,
// blocks by kLargestBlock, walks and lists by the numbers above.
Hdf5Structure::Hdf5Structure(const PosixFile& file) : file_(file), file_bytes_(file.size()) {
  read_group(find_root());
}

// II.A: the superblock stands at 0, 512, 1024, 2048, ...; returns the address of the root group's header.
std::uint64_t Hdf5Structure::find_root() {
  constexpr std::string_view kSignature("\x89HDF\r\n\x1a\n", 8);
  for (;; base_ = base_ == 0 ? 512 : base_ * 2) {
    if (base_ > file_bytes_ || file_bytes_ - base_ < 96) damaged("it has no HDF5 signature");
    if (bytes(0, 8) == kSignature) break;
  }
  const std::string block = bytes(0, 96);
  Cursor at(*this, block);
  at.skip(8);
  const std::uint64_t version = at.number(1);
  if (version > 3) damaged("its version is unknown");
  if (version < 2) at.skip(4);
  const std::uint64_t address_bytes = at.number(1), length_bytes = at.number(1);
  if (address_bytes != 8 || length_bytes != 8) damaged("its addresses have not 8 bytes");
  // Left: 0 and 1 have a reserved byte, two fan-outs and flags (1: two more); 2 and 3 have flags.
  at.skip(version == 0 ? 9 : version == 1 ? 13 : 1);
  at.skip(16);  // base address (the place found counts), free space or extension
  const std::uint64_t end = at.number(8);
  if (end > file_bytes_) damaged("it is truncated");
  if (version < 2) at.skip(16);  // driver block, offset of the root's name
  return at.number(8);
}

// IV.A: the messages of an object's header, those of its continuations included.
std::vector<Hdf5Structure::Message> Hdf5Structure::messages_of(std::uint64_t header) const {
  const std::string start = bytes(header, 16);
  const bool second_version = start.starts_with("OHDR");
  std::vector<Message> messages;
  bool with_order = false;
  if (second_version) {
    const auto flags = static_cast<unsigned char>(start[5]);
    with_order = (flags & 4u) != 0;
    // Signature, version and flags; four times of access and change; limits of attribute storage. The last two are
    // optional.
    const std::uint64_t skipped = 6 + ((flags & 0x20u) != 0 ? 16 : 0) + ((flags & 0x10u) != 0 ? 4 : 0);
    const std::size_t width = std::size_t{1} << (flags & 3u);
    const std::string size = bytes(header + skipped, width);
    const std::uint64_t length = Cursor(*this, size).number(width);
    add_messages(bytes(header + skipped + width, length), true, with_order, messages);
  } else {
    Cursor at(*this, start);
    if (at.number(1) != 1) damaged("an object's header is unknown");
    at.skip(7);
    add_messages(bytes(header + 16, at.number(4)), false, false, messages);
  }
  std::size_t continuations = 0;
  for (std::size_t i = 0; i < messages.size(); ++i) {  // grows while it is walked
    if (messages[i].type != kContinuation) continue;
    if (++continuations > kMostContinuations) damaged("an object's header has no end");
    const std::string target = messages[i].data;
    Cursor at(*this, target);
    const std::uint64_t address = at.number(8);
    std::string block = bytes(address, at.number(8));
    if (second_version) {  // a signature before, a checksum behind
      if (block.size() < 8 || !block.starts_with("OCHK")) damaged("a header's continuation is missing");
      block = block.substr(4, block.size() - 8);
    }
    add_messages(block, second_version, with_order, messages);
  }
  return messages;
}

void Hdf5Structure::add_messages(const std::string& block, bool second_version, bool with_order,
                                 std::vector<Message>& messages) const {
  const std::uint64_t head = second_version ? (with_order ? 6 : 4) : 8;
  for (Cursor at(*this, block); at.left() >= head;) {
    Message m;
    m.type = static_cast<unsigned>(at.number(second_version ? 1 : 2));
    const std::uint64_t size = at.number(2);
    m.shared = (at.number(1) & 2u) != 0;
    at.skip(second_version ? (with_order ? 2 : 0) : 3);
    m.data = at.take(size);
    messages.push_back(std::move(m));
    if (messages.size() > kMostMessages) damaged("an object has too many messages");
  }
}

void Hdf5Structure::read_group(std::uint64_t header) {
  for (const Message& m : messages_of(header)) {
    Cursor at(*this, m.data);
    if (m.type == kSymbolTable) {
      const std::uint64_t tree = at.number(8);
      int left = kMostNodes;
      read_symbols(tree, heap_of_names(at.number(8)), -1, left);
    } else if (m.type == kLink) {
      read_link(m);
    } else if (m.type == kAttribute) {
      read_attribute(m);
    } else if (m.type == kLinkInfo || m.type == kAttributeInfo) {
      at.skip(1);
      const bool indexed = (at.number(1) & 1u) != 0;
      at.skip(indexed ? (m.type == kLinkInfo ? 8 : 2) : 0);
      if (at.number(8) == kUndefined) continue;
      if (m.type == kLinkInfo) damaged("its root group holds too many datasets for a token file");
      dense_attributes_ = true;
    }
  }
}

// III.D: the segment that holds a group's names.
std::string Hdf5Structure::heap_of_names(std::uint64_t address) const {
  const std::string block = bytes(address, 32);
  Cursor at(*this, block);
  if (at.take(4) != "HEAP") damaged("its names are missing");
  at.skip(4);
  const std::uint64_t size = at.number(8);
  at.skip(8);
  return bytes(at.number(8), size);
}

// III.A.1 and III.C: a tree whose leaves list names and addresses. `level` is -1 at the root; `left` bounds the walk.
void Hdf5Structure::read_symbols(std::uint64_t tree, const std::string& names, int level, int& left) {
  if (--left < 0) damaged("its root group has no end");
  const std::string start = bytes(tree, 24);
  Cursor node(*this, start);
  if (node.take(4) != "TREE" || node.number(1) != 0) damaged("its root group is broken");
  const int height = static_cast<int>(node.number(1));
  if (level >= 0 && height != level) damaged("its root group is broken");
  const std::uint64_t children = node.number(2);
  const std::string entries = bytes(tree + 24, children * 16);
  Cursor at(*this, entries);
  for (std::uint64_t i = 0; i < children; ++i) {
    at.skip(8);
    const std::uint64_t child = at.number(8);
    if (height > 0) {
      read_symbols(child, names, height - 1, left);
      continue;
    }
    if (--left < 0) damaged("its root group has no end");
    const std::string head = bytes(child, 8);
    Cursor leaf(*this, head);
    if (leaf.take(4) != "SNOD") damaged("its root group is broken");
    leaf.skip(2);
    const std::uint64_t symbols = leaf.number(2);
    const std::string table = bytes(child + 8, symbols * 40);
    Cursor symbol(*this, table);
    for (std::uint64_t k = 0; k < symbols; ++k) {
      const std::uint64_t name = symbol.number(8), header = symbol.number(8);
      const bool hard = symbol.number(4) != 2;  // 2: a symbolic link
      symbol.skip(20);
      if (name >= names.size()) damaged("a dataset has no name");
      const std::size_t length = std::min<std::size_t>(names.find('\0', name), names.size()) - name;
      // Pointers may share bytes, so that the bounds of the single parts do not bound what is kept.
      if (length > kLongestText) damaged("a dataset's name is too long");
      if (links_.size() >= kMostLinks) damaged("its root group holds too many datasets for a token file");
      if (!links_.insert({names.substr(name, length), {hard, header}}).second)
        damaged("two datasets have one name");
    }
  }
}

// IV.A.2.g
void Hdf5Structure::read_link(const Message& message) {
  Cursor at(*this, message.data);
  if (at.number(1) != 1) damaged("a link is of an unknown version");
  const std::uint64_t flags = at.number(1);
  const bool hard = (flags & 8u) == 0 || at.number(1) == 0;
  at.skip(((flags & 4u) != 0 ? 8 : 0) + ((flags & 0x10u) != 0 ? 1 : 0));
  const std::string name(at.take(at.number(std::size_t{1} << (flags & 3u))));
  links_.insert({name, {hard, hard ? at.number(8) : kUndefined}});
}

}  // namespace upmoe
