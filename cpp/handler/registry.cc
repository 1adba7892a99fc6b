#include "handler/registry.h"

#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

namespace bridge {
namespace {

struct Table {
  std::shared_mutex mutex;
  // The keys view the callables' own names. An entry is withdrawn before its callable dies.
  std::unordered_map<std::string_view, std::weak_ptr<Callable>> entries;
};

// Is never destroyed, because XLA's threads may outlive static destructors.
Table& GetTable() {
  static Table* table = new Table;
  return *table;
}

}  // namespace

bool Registry::Add(const std::shared_ptr<Callable>& callable) {
  Table& table = GetTable();
  std::unique_lock lock(table.mutex);
  return table.entries.try_emplace(callable->name, callable).second;
}

void Registry::Withdraw(Callable& callable) noexcept {
  Owned run, collect, place, default_dtype;  // outlive the lock, for dropping them may run any code
  Table& table = GetTable();
  std::unique_lock lock(table.mutex);
  auto found = table.entries.find(callable.name);
  if (found != table.entries.end() && found->first.data() == callable.name.data()) {
    table.entries.erase(found);
  }
  run = std::move(callable.run);
  collect = std::move(callable.collect);
  place = std::move(callable.place);
  default_dtype = std::move(callable.default_dtype);
}

Found Registry::Find(std::string_view name) {
  Found found;
  Table& table = GetTable();
  std::shared_lock lock(table.mutex);
  auto entry = table.entries.find(name);
  if (entry == table.entries.end()) return found;
  found.callable = entry->second.lock();
  if (found.callable) {
    found.run = Owned::Borrow(found.callable->run.get());
    found.collect = Owned::Borrow(found.callable->collect.get());
    found.place = Owned::Borrow(found.callable->place.get());
    found.default_dtype = Owned::Borrow(found.callable->default_dtype.get());
  }
  return found;
}

}  // namespace bridge
