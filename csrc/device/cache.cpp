#include "cache.h"

#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace fusedopt {

namespace {

namespace fs = std::filesystem;

std::string setting(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// FNV-1a. It finds files and damage; the key that a file holds says whether it is the right one.
std::string hash(const std::string& text) {
  std::uint64_t hash = 0xCBF29CE484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  char digits[17];
  std::snprintf(digits, sizeof(digits), "%016llx", static_cast<unsigned long long>(hash));
  return digits;
}

std::string header_of(const std::string& key, const std::string& content) {
  return "fusedopt 1 " + std::to_string(key.size()) + " " + std::to_string(content.size()) + " " +
         hash(key + content) + "\n";
}

// What others can write would run on the GPU in the name of this user.
bool is_ours(const std::string& path) {
  struct stat status;
  if (stat(path.c_str(), &status) != 0) return false;
  const bool owned = status.st_uid == geteuid() || status.st_uid == 0;
  return owned && (status.st_mode & (S_IWGRP | S_IWOTH)) == 0;
}

}  // namespace

Cache::Cache() {
  const std::string own = setting("FUSEDOPT_CACHE_DIR"), xdg = setting("XDG_CACHE_HOME");
  const std::string home = setting("HOME");
  if (!own.empty()) {
    folder_ = own;
  } else if (!xdg.empty()) {
    folder_ = xdg + "/fusedopt";
  } else if (!home.empty()) {
    folder_ = home + "/.cache/fusedopt";
  } else {
    problem_ = "neither FUSEDOPT_CACHE_DIR nor HOME is set";
    return;
  }
  std::error_code error;
  if (!fs::is_directory(folder_, error)) {
    fs::create_directories(folder_, error);
    if (error) {
      problem_ = folder_ + " cannot be made: " + error.message();
      return;
    }
    fs::permissions(folder_, fs::perms::owner_all, error);
  }
  if (!is_ours(folder_)) {
    problem_ = folder_ + " belongs to another user, or others can write there: " +
               "name a folder of your own with FUSEDOPT_CACHE_DIR";
  } else if (access(folder_.c_str(), R_OK | X_OK) != 0) {
    problem_ = folder_ + " cannot be read: " + std::strerror(errno);
  }
}

std::string Cache::path_of(const std::string& name, const std::string& key) const {
  return folder_ + "/" + name + "-" + hash(key);
}

std::optional<std::string> Cache::read(const std::string& name, const std::string& key) const {
  if (!problem_.empty()) return std::nullopt;
  const std::string path = path_of(name, key);
  if (!is_ours(path)) return std::nullopt;
  std::ifstream file(path, std::ios::binary);
  std::ostringstream all;
  if (!file || !(all << file.rdbuf())) return std::nullopt;
  const std::string text = all.str();
  const std::size_t line = text.find('\n');
  if (line == std::string::npos || text.compare(line + 1, key.size(), key) != 0) {
    return std::nullopt;
  }
  std::string content = text.substr(line + 1 + key.size());
  if (text.substr(0, line + 1) != header_of(key, content)) return std::nullopt;
  return content;
}

std::string Cache::write(const std::string& name, const std::string& key,
                         const std::string& content) const {
  if (!problem_.empty()) return problem_;
  static std::atomic<unsigned> written{0};
  const std::string path = path_of(name, key);
  const std::string part =
      path + "." + std::to_string(getpid()) + "." + std::to_string(written++) + ".part";
  errno = 0;
  std::ofstream file(part, std::ios::binary);
  file << header_of(key, content) << key << content;
  file.close();
  if (file && chmod(part.c_str(), S_IRUSR | S_IWUSR) == 0 &&
      std::rename(part.c_str(), path.c_str()) == 0) {
    return "";
  }
  const std::string why = std::strerror(errno);
  std::remove(part.c_str());
  return folder_ + " cannot be written: " + why +
         ": make room, or name another folder with FUSEDOPT_CACHE_DIR";
}

}  // namespace fusedopt
