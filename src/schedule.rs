//! Which waiting task starts next, and on what. A pure state machine: the caller brings the clock.
//!
//! Order: the highest priority first (the longest remaining path). What does not fit is passed over, but the first
//! such task gets a reservation: the time at which, by the estimates of what runs, it will fit. A task behind it may
//! start early only if it ends before that time or leaves enough for the reservation ("EASY" backfilling: Lifka, The
//! ANL/IBM SP scheduling system, 1995). Estimates may be wrong and higher priorities may keep arriving, so a task that
//! was overtaken [`PATIENCE`] times goes to the front, and after twice as many nothing may overtake it at all.

use std::collections::{BTreeMap, HashMap, btree_map};

use crate::device::{Lease, Machine, Pool, Request, Unfit, pool::Usage};

/// How often a waiting task may be overtaken by later ones before it goes to the front.
pub const PATIENCE: u32 = 32;
/// How far to look behind a task that may not overtake, for a shorter one with the same needs.
const LOOK_BEHIND: usize = 16;

/// The caller's number for a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(pub usize);

/// A task that is ready to run.
#[derive(Debug, Clone, Copy)]
pub struct Task {
    pub id: TaskId,
    pub request: Request,
    /// Higher starts first: seconds of the longest path from here to an end of the graph.
    pub priority: f64,
    /// Expected seconds; `None` if nothing is known.
    pub estimate: Option<f64>,
}

/// A task to start now, with what it was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    pub id: TaskId,
    pub lease: Lease,
}

/// Sorts as tasks are to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Order {
    /// 0 for tasks that waited too long: those by arrival, whatever their priority.
    class: u8,
    /// Higher priorities are smaller numbers here.
    priority: i64,
    arrival: u64,
}

#[derive(Debug)]
struct Waiting {
    task: Task,
    overtaken: u32,
}

#[derive(Debug)]
struct Running {
    lease: Lease,
    /// When it is expected to end.
    end: Option<f64>,
}

/// The ready queue and the pool.
#[derive(Debug)]
pub struct Scheduler {
    pool: Pool,
    /// By what they need: if one of them does not fit, none does.
    waiting: BTreeMap<Request, BTreeMap<Order, Waiting>>,
    running: HashMap<TaskId, Running>,
    arrivals: u64,
}

/// The first task that does not fit.
struct Reservation {
    request: Request,
    /// When it will fit; `None` if some of what it waits for has no estimate.
    at: Option<f64>,
    /// The pool at that time.
    pool: Pool,
    /// Nothing may overtake it.
    strict: bool,
}

impl Scheduler {
    pub fn new(machine: &Machine) -> Self {
        Self { pool: Pool::new(machine), waiting: BTreeMap::new(), running: HashMap::new(), arrivals: 0 }
    }

    /// Adds a task that is ready.
    ///
    /// # Errors
    /// If it needs more than the machine has.
    pub fn add(&mut self, task: Task) -> Result<(), Unfit> {
        self.pool.check(task.request)?;
        let order = Order { class: 1, priority: descending(task.priority), arrival: self.arrivals };
        self.arrivals += 1;
        let queue = self.waiting.entry(self.pool.clamp(task.request)).or_default();
        queue.insert(order, Waiting { task, overtaken: 0 });
        Ok(())
    }

    /// Forgets a task that did not start (a stage before it failed, the run stops).
    pub fn remove(&mut self, id: TaskId) {
        for queue in self.waiting.values_mut() {
            queue.retain(|_, waiting| waiting.task.id != id);
        }
        self.waiting.retain(|_, queue| !queue.is_empty());
    }

    /// A started task has ended: takes back what it held.
    pub fn finish(&mut self, id: TaskId) {
        if let Some(running) = self.running.remove(&id) {
            self.pool.release(&running.lease);
        }
    }

    /// Starts whatever may start now; `now` is in seconds on a clock of the caller's.
    pub fn start(&mut self, now: f64) -> Vec<Start> {
        let mut started: Vec<(u64, Start)> = Vec::new();
        let mut reservation: Option<Reservation> = None;
        // Where each kind of need goes on in its queue, and how many of it were looked at in vain.
        let mut next: Vec<(Order, Request, usize)> =
            self.waiting.iter().filter_map(|(request, queue)| Some((*queue.keys().next()?, *request, 0))).collect();
        while !self.pool.is_full() {
            let Some(best) = (0..next.len()).min_by_key(|i| next.get(*i).map(|n| n.0)) else { break };
            let (order, request, looked) = next.swap_remove(best);
            let Some(task) = self.waiting.get(&request).and_then(|q| q.get(&order)).map(|w| w.task) else { continue };
            let fits = self.pool.find(request);
            let may = match (&fits, &mut reservation) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(lease), Some(reservation)) => reservation.permits(lease, task.estimate.map(|e| now + e)),
            };
            let looked = match fits.filter(|_| may) {
                Some(lease) => {
                    self.pool.take(&lease);
                    let end = task.estimate.map(|e| now + e);
                    self.running.insert(task.id, Running { lease: lease.clone(), end });
                    started.push((order.arrival, Start { id: task.id, lease }));
                    self.dequeue(request, order);
                    looked
                }
                None => {
                    if reservation.is_none() {
                        reservation = self.reserve(request, order);
                    }
                    // Others with the same needs do not fit either, unless it was the reservation that refused.
                    if self.pool.find(request).is_none() || looked >= LOOK_BEHIND {
                        continue;
                    }
                    looked + 1
                }
            };
            let behind = (std::ops::Bound::Excluded(order), std::ops::Bound::Unbounded);
            let following = self.waiting.get(&request).and_then(|queue| queue.range(behind).next());
            next.extend(following.map(|(order, _)| (*order, request, looked)));
        }
        self.note_overtaken(&started);
        started.into_iter().map(|(_, start)| start).collect()
    }

    fn dequeue(&mut self, request: Request, order: Order) {
        if let btree_map::Entry::Occupied(mut queue) = self.waiting.entry(request) {
            queue.get_mut().remove(&order);
            if queue.get().is_empty() {
                queue.remove();
            }
        }
    }

    /// When the task will fit, by the estimates of what runs. `None` if even all of that would not be enough: other
    /// runs hold what it needs, and holding back our own tasks would not help.
    fn reserve(&self, request: Request, order: Order) -> Option<Reservation> {
        let mut pool = self.pool.clone();
        let mut running: Vec<&Running> = self.running.values().collect();
        running.sort_by(|a, b| a.end.unwrap_or(f64::INFINITY).total_cmp(&b.end.unwrap_or(f64::INFINITY)));
        let waiting = self.waiting.get(&request)?.get(&order)?;
        let strict = waiting.overtaken >= 2 * PATIENCE;
        for task in running {
            pool.release(&task.lease);
            if pool.find(request).is_some() {
                return Some(Reservation { request, at: task.end, pool, strict });
            }
        }
        None
    }

    /// Counts for the first task of every kind of need how many that came later have just started.
    fn note_overtaken(&mut self, started: &[(u64, Start)]) {
        if started.is_empty() {
            return;
        }
        for queue in self.waiting.values_mut() {
            let Some(mut first) = queue.first_entry() else { continue };
            let order = *first.key();
            let later = started.iter().filter(|(arrival, _)| *arrival > order.arrival).count();
            let overtaken = &mut first.get_mut().overtaken;
            *overtaken = overtaken.saturating_add(u32::try_from(later).unwrap_or(u32::MAX));
            if order.class > 0 && *overtaken >= PATIENCE {
                let waiting = first.remove();
                queue.insert(Order { class: 0, priority: 0, arrival: order.arrival }, waiting);
            }
        }
    }

    /// A GPU is gone: it is not given again. Returns the waiting tasks that no longer fit this machine, with why; they
    /// are forgotten.
    pub fn lose(&mut self, gpu: usize) -> Vec<(TaskId, Unfit)> {
        self.pool.lose(gpu);
        let tasks = self.waiting.values().flat_map(|queue| queue.values().map(|waiting| waiting.task));
        let unfit: Vec<(TaskId, Unfit)> =
            tasks.filter_map(|task| Some((task.id, self.pool.check(task.request).err()?))).collect();
        unfit.iter().for_each(|(id, _)| self.remove(*id));
        unfit
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn waiting(&self) -> usize {
        self.waiting.values().map(BTreeMap::len).sum()
    }

    /// What this run holds.
    pub fn usage(&self) -> &Usage {
        self.pool.own()
    }

    /// Sets what other runs on this machine hold.
    pub fn set_foreign(&mut self, foreign: Usage) {
        self.pool.set_foreign(foreign);
    }

    /// Tasks wait while other runs hold something: worth another look soon, without any event of our own.
    pub fn waits_for_others(&self) -> bool {
        !self.waiting.is_empty() && !self.pool.foreign().is_empty()
    }
}

impl Reservation {
    /// Whether a task that holds `lease` until `end` may start before the reserved one.
    fn permits(&mut self, lease: &Lease, end: Option<f64>) -> bool {
        let in_time = matches!((end, self.at), (Some(end), Some(at)) if end <= at);
        if in_time && !self.strict {
            return true;
        }
        self.pool.take(lease);
        let leaves_enough = self.pool.find(self.request).is_some();
        if !leaves_enough {
            self.pool.release(lease);
        }
        leaves_enough
    }
}

/// Maps priorities to integers that sort the other way round. Not-a-number sorts last.
fn descending(priority: f64) -> i64 {
    if priority.is_nan() {
        return i64::MAX;
    }
    let bits = priority.to_bits() as i64;
    let ascending = bits ^ ((((bits >> 63) as u64) >> 1) as i64);
    !ascending
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Gpu;

    fn machine(cpus: u32, gpus: usize) -> Machine {
        let gpu = |i| Gpu { name: format!("sim{i}"), uuid: format!("sim-{i}"), memory: 80, simulated: true };
        Machine { cpus, memory: 100, gpus: (0..gpus).map(gpu).collect() }
    }

    fn task(id: usize, cpus: u32, gpus: u32, priority: f64, estimate: Option<f64>) -> Task {
        let request = Request { cpus, memory: 0, gpus, gpu_memory: None };
        Task { id: TaskId(id), request, priority, estimate }
    }

    fn ids(starts: &[Start]) -> Vec<usize> {
        starts.iter().map(|s| s.id.0).collect()
    }

    #[test]
    fn the_longest_remaining_path_starts_first() {
        let mut scheduler = Scheduler::new(&machine(2, 0));
        for (id, priority) in [1.0, 5.0, -3.0, 4.0].into_iter().enumerate() {
            scheduler.add(task(id, 1, 0, priority, None)).unwrap();
        }
        assert_eq!(ids(&scheduler.start(0.0)), [1, 3]);
        scheduler.finish(TaskId(3));
        assert_eq!(ids(&scheduler.start(0.0)), [0]);
    }

    #[test]
    fn short_tasks_fill_gaps_without_delaying_the_large_one() {
        let mut scheduler = Scheduler::new(&machine(4, 0));
        scheduler.add(task(0, 2, 0, 9.0, Some(10.0))).unwrap();
        scheduler.add(task(1, 4, 0, 8.0, Some(5.0))).unwrap();
        scheduler.add(task(2, 1, 0, 7.0, Some(11.0))).unwrap();
        scheduler.add(task(3, 1, 0, 6.0, Some(10.0))).unwrap();
        scheduler.add(task(4, 1, 0, 5.0, None)).unwrap();
        assert_eq!(ids(&scheduler.start(0.0)), [0, 3], "2 and 4 may end after 0 does");
        scheduler.finish(TaskId(0));
        scheduler.finish(TaskId(3));
        assert_eq!(ids(&scheduler.start(10.0)), [1]);
    }

    #[test]
    fn tasks_that_leave_enough_start_beside_a_waiting_gang() {
        let mut scheduler = Scheduler::new(&machine(8, 4));
        scheduler.add(task(0, 1, 2, 9.0, None)).unwrap();
        scheduler.add(task(1, 1, 3, 8.0, None)).unwrap();
        for id in 2..5 {
            scheduler.add(task(id, 1, 1, 7.0, None)).unwrap();
        }
        scheduler.add(task(5, 1, 0, 1.0, None)).unwrap();
        assert_eq!(ids(&scheduler.start(0.0)), [0, 2, 5], "one GPU and cores are spare, the rest is reserved");
        scheduler.finish(TaskId(0));
        assert_eq!(ids(&scheduler.start(1.0)), [1]);
    }

    #[test]
    fn a_stream_of_urgent_small_tasks_does_not_starve_a_large_one() {
        let mut scheduler = Scheduler::new(&machine(4, 0));
        for id in 0..4 {
            scheduler.add(task(id, 1, 0, 100.0, Some(4.0))).unwrap();
        }
        scheduler.start(0.0);
        scheduler.add(task(1000, 4, 0, 0.0, None)).unwrap();
        for step in 1..500 {
            // Estimates promise an end that never comes in time.
            scheduler.add(task(step + 3, 1, 0, 100.0, Some(0.01))).unwrap();
            scheduler.finish(TaskId(step - 1));
            if ids(&scheduler.start(step as f64)).contains(&1000) {
                return;
            }
        }
        panic!("the large task never started");
    }

    #[test]
    fn what_other_runs_hold_does_not_hold_back_our_small_tasks() {
        let mut scheduler = Scheduler::new(&machine(4, 0));
        scheduler.set_foreign(Usage { cpus: 2, ..Usage::default() });
        scheduler.add(task(0, 4, 0, 9.0, None)).unwrap();
        scheduler.add(task(1, 1, 0, 1.0, None)).unwrap();
        assert_eq!(ids(&scheduler.start(0.0)), [1]);
        assert!(scheduler.waits_for_others());
        scheduler.set_foreign(Usage::default());
        scheduler.finish(TaskId(1));
        assert_eq!(ids(&scheduler.start(1.0)), [0]);
        assert!(!scheduler.waits_for_others());
    }

    #[test]
    fn tasks_that_a_lost_gpu_leaves_without_place_are_told() {
        let mut scheduler = Scheduler::new(&machine(4, 2));
        scheduler.add(task(0, 1, 1, 9.0, None)).unwrap();
        scheduler.add(task(1, 1, 2, 8.0, None)).unwrap();
        scheduler.add(task(2, 1, 1, 1.0, None)).unwrap();
        let started = scheduler.start(0.0);
        let lost = started[0].lease.gpus[0];
        assert_eq!(scheduler.lose(lost).into_iter().map(|(id, _)| id).collect::<Vec<_>>(), [TaskId(1)]);
        scheduler.finish(TaskId(0));
        let later = scheduler.start(1.0);
        assert!(ids(&started).contains(&2) || ids(&later) == [2]);
        assert!(later.iter().all(|start| start.lease.gpus != [lost]));
    }

    #[test]
    fn ten_thousand_ready_tasks_are_no_trouble() {
        let mut scheduler = Scheduler::new(&machine(2, 1));
        for id in 0..10_000 {
            scheduler.add(task(id, 1, u32::from(id % 2 == 0), (id % 7) as f64, None)).unwrap();
        }
        let mut running = scheduler.start(0.0);
        let mut done = 0;
        while let Some(start) = running.pop() {
            scheduler.finish(start.id);
            done += 1;
            running.extend(scheduler.start(0.0));
        }
        assert_eq!((done, scheduler.waiting()), (10_000, 0));
    }

    prop_compose! {
        fn any_request()(cpus in 0u32..6, memory in 0u64..=100, gpus in 0u32..=3, share in prop::option::of(0u64..=80))
            -> Request {
            Request { cpus, memory, gpus, gpu_memory: share }
        }
    }

    proptest! {
        /// Nothing is ever given twice, and everything that can run does.
        #[test]
        fn never_oversubscribed_and_everything_finishes(
            tasks in prop::collection::vec((any_request(), 0.0f64..10.0, prop::option::of(0.0f64..10.0)), 1..60),
            ends in prop::collection::vec(any::<prop::sample::Index>(), 60),
        ) {
            let machine = machine(4, 3);
            let mut scheduler = Scheduler::new(&machine);
            for (id, (request, priority, estimate)) in tasks.iter().enumerate() {
                let task = Task { id: TaskId(id), request: *request, priority: *priority, estimate: *estimate };
                scheduler.add(task).unwrap();
            }
            let mut running: Vec<Start> = Vec::new();
            let mut seen = std::collections::HashSet::new();
            for (step, end) in ends.iter().enumerate() {
                for start in scheduler.start(step as f64) {
                    prop_assert!(seen.insert(start.id), "started twice");
                    running.push(start);
                }
                let cpus: u32 = running.iter().map(|s| s.lease.cpus).sum();
                let memory: u64 = running.iter().map(|s| s.lease.memory).sum();
                prop_assert!(cpus <= 4 && memory <= 100);
                for gpu in 0..3 {
                    let on: Vec<_> = running.iter().filter(|s| s.lease.gpus.contains(&gpu)).collect();
                    let whole = on.iter().filter(|s| s.lease.gpu_memory.is_none()).count();
                    let shared: u64 = on.iter().filter_map(|s| s.lease.gpu_memory).sum();
                    prop_assert!(shared <= 80 && (whole == 0 || on.len() == 1));
                }
                for start in &running {
                    let (request, mut gpus) = (tasks[start.id.0].0, start.lease.gpus.clone());
                    gpus.dedup();
                    prop_assert_eq!(gpus.len(), request.gpus as usize, "a gang is whole");
                }
                if running.is_empty() {
                    break;
                }
                let ended = running.swap_remove(end.index(running.len()));
                scheduler.finish(ended.id);
            }
            prop_assert_eq!(seen.len(), tasks.len());
            prop_assert_eq!(scheduler.waiting(), 0);
        }

        #[test]
        fn priorities_sort_downwards(a in any::<f64>(), b in any::<f64>()) {
            prop_assume!(!a.is_nan() && !b.is_nan() && a != b);
            prop_assert_eq!(a > b, descending(a) < descending(b));
        }
    }
}
