// Tables that are made once for the numbers they depend on.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <tuple>

namespace spanet {

// Table(key...), kept with those of up to 255 other keys.
template <class Table, class... Key> std::shared_ptr<const Table> remembered(const Key&... key) {
  static std::mutex mutex;
  static std::map<std::tuple<Key...>, std::shared_ptr<const Table>> tables;
  const std::tuple<Key...> keys{key...};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = tables.find(keys);
  if (found != tables.end()) return found->second;
  if (tables.size() >= 256) tables.clear();
  return tables[keys] = std::make_shared<const Table>(key...);
}

}  // namespace spanet
