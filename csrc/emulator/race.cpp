#include "race.h"

#include <algorithm>
#include <cstdio>

#include "block.h"

namespace llama_fast::emulator {
namespace {

constexpr int kAgentsAtMost = 96;
constexpr int kAgentGroup = 1 << 16;  // Reader::group of agent 0

}  // namespace

void Races::reset(int threads) {
  threads_ = threads;
  agents_ = 0;
  time_ = 1;
  ++generation_;
  if (cells_.empty()) cells_.resize(kMaxShared / 16);
  free_divided_.clear();
  for (int i = 0; i < static_cast<int>(divided_.size()); ++i) free_divided_.push_back(i);
  last_join_ = last_learnt_ = {};
  auto* nothing = new Knowledge;
  nothing->seen.assign(static_cast<size_t>(threads + kAgentsAtMost), 0);
  nothing->fenced = nothing->seen;
  const KnowledgeRef start(nothing);
  actors_.resize(static_cast<size_t>(threads));
  for (Actor& a : actors_) a = Actor{1, 0, start};
}

// ---- order ----------------------------------------------------------------------------------------------------------
void Races::release(int thread, Channel& channel) {
  Actor& a = actors_[thread];
  const bool known = std::find(channel.joined_.begin(), channel.joined_.end(), a.knows) != channel.joined_.end();
  if (channel.empty()) {
    channel.sum_ = KnowledgeRef(new Knowledge{0, a.knows->seen, a.knows->fenced, a.knows->foreign});
  } else if (!known) {
    auto* sum = const_cast<Knowledge*>(channel.sum_.get());
    for (size_t i = 0; i < sum->seen.size(); ++i) sum->seen[i] = std::max(sum->seen[i], a.knows->seen[i]);
    for (size_t i = 0; i < sum->seen.size(); ++i) sum->fenced[i] = std::max(sum->fenced[i], a.knows->fenced[i]);
    sum->foreign = llama_fast::emulator::join(sum->foreign, a.knows->foreign);
  }
  if (!known) channel.joined_.push_back(a.knows);
  auto* sum = const_cast<Knowledge*>(channel.sum_.get());
  sum->seen[thread] = std::max(sum->seen[thread], a.now);
  sum->fenced[thread] = std::max(sum->fenced[thread], a.fenced);
  a.now = tick();
}

void Races::release_agent(int agent, Clock clock, Channel& channel) {
  if (channel.empty()) {
    auto* nothing = new Knowledge;
    nothing->seen.assign(static_cast<size_t>(threads_ + kAgentsAtMost), 0);
    nothing->fenced = nothing->seen;
    channel.sum_ = KnowledgeRef(nothing);
  }
  Clock& seen = const_cast<Knowledge*>(channel.sum_.get())->seen[threads_ + agent];
  seen = std::max(seen, clock);
}

KnowledgeRef Races::take(Channel& channel) {
  channel.joined_.clear();
  return std::move(channel.sum_);
}

KnowledgeRef Races::join(const KnowledgeRef& a, const KnowledgeRef& b) {
  if (a == b) return a;
  bool a_below = a->foreign == b->foreign || a->foreign == nullptr;
  bool b_below = a->foreign == b->foreign || b->foreign == nullptr;
  const size_t n = a->seen.size();
  for (size_t i = 0; i < n; ++i) {
    a_below = a_below && a->seen[i] <= b->seen[i] && a->fenced[i] <= b->fenced[i];
    b_below = b_below && b->seen[i] <= a->seen[i] && b->fenced[i] <= a->fenced[i];
  }
  if (a_below) return b;
  if (b_below) return a;
  auto* sum = new Knowledge{0, a->seen, a->fenced, llama_fast::emulator::join(a->foreign, b->foreign)};
  for (size_t i = 0; i < n; ++i) sum->seen[i] = std::max(sum->seen[i], b->seen[i]);
  for (size_t i = 0; i < n; ++i) sum->fenced[i] = std::max(sum->fenced[i], b->fenced[i]);
  return KnowledgeRef(sum);
}

void Races::acquire(int thread, const KnowledgeRef& knowledge) {
  if (knowledge.get() == nullptr) return;
  Actor& a = actors_[thread];
  if (!(last_join_.from == a.knows && last_join_.with == knowledge))
    last_join_ = {a.knows, knowledge, join(a.knows, knowledge)};
  a.knows = last_join_.result;
}

void Races::acquire(const std::vector<int>& threads, const KnowledgeRef& knowledge) {
  const Clock now = tick();
  for (int thread : threads) {
    acquire(thread, knowledge);
    actors_[thread].now = now;  // equal clocks keep the lists of readers short
  }
}

void Races::synchronize(const int* threads, int count) {
  Channel channel;
  for (int i = 0; i < count; ++i) release(threads[i], channel);
  const KnowledgeRef all = take(channel);
  const Clock now = tick();
  for (int i = 0; i < count; ++i) {
    actors_[threads[i]].knows = all;  // it holds what each of them knew
    actors_[threads[i]].now = now;
  }
}

void Races::fence_proxy(int thread) {
  Actor& a = actors_[thread];
  auto* k = new Knowledge{0, a.knows->seen, a.knows->seen, a.knows->foreign};
  a.knows = KnowledgeRef(k);
  a.fenced = a.now;
  a.now = tick();
}

int Races::new_agents(int count) {
  if (agents_ + count > kAgentsAtMost)
    block_.fail("the race checker follows %d mbarriers and the like at once", kAgentsAtMost);
  agents_ += count;
  return agents_ - count;
}

// The one that the lowest bit of `lanes` stands for.
int Races::actor(int group, uint32_t lanes) const {
  const int lane = __builtin_ctz(lanes);
  return group >= kAgentGroup ? threads_ + group - kAgentGroup + lane : group * kWarp + lane;
}

void Races::learn(int thread, int agent, Clock clock) {
  Actor& a = actors_[thread];
  if (a.knows->seen[threads_ + agent] >= clock) return;
  // the threads of a warpgroup come with one knowledge, one after the other, to learn the same
  const KnowledgeRef& last = last_learnt_.result;
  if (!(last_learnt_.from == a.knows) || last->seen[threads_ + agent] != clock) {
    auto* k = new Knowledge{0, a.knows->seen, a.knows->fenced, a.knows->foreign};
    k->seen[threads_ + agent] = clock;
    last_learnt_ = {a.knows, {}, KnowledgeRef(k)};
  }
  a.knows = last_learnt_.result;
}

bool Races::behind(int thread, int actor, Clock clock) const {
  return actor == thread || clock <= actors_[thread].knows->seen[actor];
}

bool Races::fenced_behind(int thread, int actor, Clock clock) const {
  return (actor == thread && clock <= actors_[thread].fenced) || clock <= actors_[thread].knows->fenced[actor];
}

// ---- between blocks
// --------------------------------------------------------------------------------------------------
ForeignRef join(const ForeignRef& a, const ForeignRef& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  auto sum = std::make_shared<Foreign>(*a);
  for (const auto& [block, clocks] : *b) {
    auto& known = (*sum)[block];
    if (known == nullptr) {
      known = clocks;
    } else if (known != clocks) {
      auto most = std::make_shared<std::vector<Clock>>(*known);
      for (size_t i = 0; i < most->size(); ++i) (*most)[i] = std::max((*most)[i], (*clocks)[i]);
      known = most;
    }
  }
  return sum;
}

ForeignRef Races::publish(int thread) {
  Actor& a = actors_[thread];
  auto mine = std::make_shared<std::vector<Clock>>(a.knows->seen);
  (*mine)[thread] = std::max((*mine)[thread], a.now);
  a.now = tick();
  return llama_fast::emulator::join(std::make_shared<Foreign>(Foreign{{block_.number(), mine}}), a.knows->foreign);
}

void Races::learn(int thread, const ForeignRef& foreign) {
  if (foreign == nullptr) return;
  Actor& a = actors_[thread];
  const Foreign* known = a.knows->foreign.get();
  const auto is_known = [known](const auto& entry) {
    const auto found = known->find(entry.first);
    return found != known->end() && found->second == entry.second;
  };
  if (known != nullptr && std::all_of(foreign->begin(), foreign->end(), is_known)) return;  // a turn of a waiting loop
  auto* k = new Knowledge{0, a.knows->seen, a.knows->fenced, llama_fast::emulator::join(a.knows->foreign, foreign)};
  const auto own = foreign->find(block_.number());
  if (own != foreign->end())
    for (size_t i = 0; i < k->seen.size(); ++i) k->seen[i] = std::max(k->seen[i], (*own->second)[i]);
  a.knows = KnowledgeRef(k);
}

bool Races::ordered(int thread, int64_t block, int actor, Clock clock) const {
  if (block == block_.number()) return behind(thread, actor, clock);
  const Foreign* foreign = actors_[thread].knows->foreign.get();
  if (foreign == nullptr) return false;
  const auto found = foreign->find(block);
  return found != foreign->end() && clock <= (*found->second)[actor];
}

// ---- cells ----------------------------------------------------------------------------------------------------------
Races::Cell& Races::granule(uint32_t index) {
  Cell& c = cells_[index];
  if (c.generation != generation_) {
    c.generation = generation_;
    c.split = c.writer = -1;
    c.readers.clear();
  }
  return c;
}

void Races::divide(Cell& cell) {
  if (free_divided_.empty()) {
    free_divided_.push_back(static_cast<int>(divided_.size()));
    divided_.emplace_back();
  }
  const int index = free_divided_.back();
  free_divided_.pop_back();
  for (Cell& byte : divided_[index]) byte = cell;
  cell.split = index;
}

// Calls f(cell, address of its first byte) for the cells of the bytes. `unite`: f leaves them all in the same state.
template <class F>
void Races::each(uint32_t address, uint32_t bytes, bool unite, F&& f) {
  const uint32_t end = address + bytes;
  for (uint32_t at = address; at < end;) {
    Cell& cell = granule(at / 16);
    const uint32_t through = std::min(end, at / 16 * 16 + 16);
    const bool whole = through - at == 16;
    if (!whole && cell.split < 0) divide(cell);
    if (cell.split < 0) {
      f(cell, at);
    } else {
      for (uint32_t byte = at; byte < through; ++byte) f(divided_[cell.split][byte % 16], byte);
      if (whole && unite) {
        free_divided_.push_back(cell.split);
        const uint32_t generation = cell.generation;
        cell = divided_[cell.split][0];
        cell.split = -1;
        cell.generation = generation;
      }
    }
    at = through;
  }
}

const char* Races::name(int actor) {
  if (actor < threads_)
    std::snprintf(name_, sizeof name_, "thread %d (warp %d lane %d)", actor, actor / kWarp, actor % kWarp);
  else
    std::snprintf(name_, sizeof name_, "an asynchronous operation");
  return name_;
}

void Races::require_written(int thread, const Cell& c, uint32_t at, const char* verb, const char* op) {
  if (c.writer < 0) return;
  if (c.kind == Kind::copying)
    block_.fail("race: %s %s shared 0x%x, to which %s's %s is in flight", op, verb, at, name(c.writer), c.op);
  if (!behind(thread, c.writer, c.clock))
    block_.fail("race: %s %s shared 0x%x, which %s wrote (%s), and nothing orders the two", op, verb, at,
                name(c.writer), c.op);
}

void Races::require_written_async(int thread, const Cell& c, uint32_t at, const char* verb, const char* op) {
  require_written(thread, c, at, verb, op);
  if (options().proxy_fences && c.writer >= 0 && c.kind == Kind::ordinary && !fenced_behind(thread, c.writer, c.clock))
    block_.fail("race: %s %s shared 0x%x, which %s wrote (%s), without a fence.proxy.async between", op, verb, at,
                name(c.writer), c.op);
}

void Races::require_read(int thread, const Cell& c, uint32_t at, const char* op) {
  for (const Reader& r : c.readers)
    for (uint32_t lanes = r.lanes; lanes != 0; lanes &= lanes - 1) {
      const int reader = actor(r.group, lanes);
      if (!behind(thread, reader, r.clock))
        block_.fail("race: %s writes shared 0x%x, which %s reads (%s), and nothing orders the two", op, at,
                    name(reader), r.op);
    }
}

void Races::add_reader(int thread, Cell& cell, Clock clock, uint32_t lanes, int group, const char* op) {
  for (Reader& r : cell.readers) {
    if (r.group != group) continue;
    if (r.clock == clock) {
      r.lanes |= lanes;
      return;
    }
    bool all_behind = true;
    for (uint32_t rest = r.lanes; rest != 0 && all_behind; rest &= rest - 1)
      all_behind = behind(thread, actor(group, rest), r.clock);
    if (all_behind) {
      r = {clock, lanes, group, op};
      return;
    }
  }
  cell.readers.push_back({clock, lanes, group, op});
}

void Races::set_writer(Cell& cell, int writer, Clock clock, Kind kind, const char* op) {
  cell.writer = writer;
  cell.clock = clock;
  cell.kind = kind;
  cell.op = op;
  cell.readers.clear();
}

// ---- accesses -------------------------------------------------------------------------------------------------------
void Races::read(int thread, uint32_t address, uint32_t bytes, const char* op) {
  const Clock now = actors_[thread].now;
  each(address, bytes, false, [&](Cell& c, uint32_t at) {
    require_written(thread, c, at, "reads", op);
    add_reader(thread, c, now, 1u << (thread % kWarp), thread / kWarp, op);
  });
}

void Races::write(int thread, uint32_t address, uint32_t bytes, const char* op) {
  const Clock now = actors_[thread].now;
  each(address, bytes, true, [&](Cell& c, uint32_t at) {
    require_written(thread, c, at, "writes", op);
    require_read(thread, c, at, op);
    set_writer(c, thread, now, Kind::ordinary, op);
  });
}

void Races::begin_copy(int thread, uint32_t address, uint32_t bytes, const char* op) {
  write(thread, address, bytes, op);
  each(address, bytes, true, [&](Cell& c, uint32_t) { c.kind = Kind::copying; });
}

void Races::end_copy(int thread, uint32_t address, uint32_t bytes, const char* op) {
  const Clock now = actors_[thread].now;
  each(address, bytes, true, [&](Cell& c, uint32_t) { set_writer(c, thread, now, Kind::ordinary, op); });
}

void Races::agent_read(const int* threads, int count, int agent, int agents, Clock clock, uint32_t address,
                       uint32_t bytes, const char* op) {
  each(address, bytes, false, [&](Cell& c, uint32_t at) {
    for (int i = 0; i < count; ++i) require_written_async(threads[i], c, at, "reads", op);
    add_reader(threads[0], c, clock, (1u << agents) - 1, kAgentGroup + agent, op);
  });
}

void Races::agent_write(int thread, int agent, Clock clock, uint32_t address, uint32_t bytes, const char* op) {
  each(address, bytes, true, [&](Cell& c, uint32_t at) {
    require_written_async(thread, c, at, "writes", op);
    require_read(thread, c, at, op);
    set_writer(c, threads_ + agent, clock, Kind::agent, op);
  });
}

void Races::check_object(int thread, int owner, Clock stamp, uint32_t address, bool by_async_proxy, bool fenced,
                         const char* what) {
  each(address, 8, false, [&](Cell& c, uint32_t at) {
    if (c.writer != owner || c.clock != stamp)
      block_.fail("%s: the mbarrier at shared 0x%x was overwritten by %s (%s)", what, address, name(c.writer), c.op);
    require_written(thread, c, at, "uses", what);
    if (by_async_proxy && !fenced && !fenced_behind(thread, owner, stamp))
      block_.fail("%s: no fence.mbarrier_init stands behind the initialization of the mbarrier at shared 0x%x", what,
                  address);
  });
}

}  // namespace llama_fast::emulator
