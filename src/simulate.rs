//! Playing a graph through the scheduler without running it: how long a run would take, and on what.
//!
//! The scheduler is the real one; only the clock is not.

use std::{cmp::Reverse, collections::BinaryHeap};

use crate::{
    device::{Lease, Machine, Request, Unfit},
    schedule::{Scheduler, Start, Task, TaskId},
};

/// A task of the graph to play.
#[derive(Debug, Clone)]
pub struct SimulatedTask {
    pub request: Request,
    /// Seconds.
    pub duration: f64,
    /// Positions of the tasks that must end first, all of them smaller than this one's.
    pub after: Vec<usize>,
}

/// When a task ran, and on what.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    pub task: usize,
    pub from: f64,
    pub to: f64,
    pub lease: Lease,
}

/// The whole run.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// Seconds from the first start to the last end.
    pub makespan: f64,
    /// In order of their starts.
    pub spans: Vec<Span>,
}

impl Timeline {
    /// What ran on one GPU, in order.
    pub fn on_gpu(&self, gpu: usize) -> impl Iterator<Item = &Span> {
        self.spans.iter().filter(move |span| span.lease.gpus.contains(&gpu))
    }

    /// The share of the makespan in which a GPU was leased at all.
    pub fn gpu_busy(&self, gpu: usize) -> f64 {
        let (mut busy, mut until) = (0.0, 0.0f64);
        for span in self.on_gpu(gpu) {
            busy += (span.to - until.max(span.from)).max(0.0);
            until = until.max(span.to);
        }
        if self.makespan > 0.0 { busy / self.makespan } else { 0.0 }
    }
}

/// The longest path in seconds from the start of each task to an end of the graph: the scheduler's priority.
pub fn remaining_paths(tasks: &[SimulatedTask]) -> Vec<f64> {
    let mut paths: Vec<f64> = tasks.iter().map(|task| task.duration).collect();
    for (index, task) in tasks.iter().enumerate().rev() {
        let behind = paths.get(index).copied().unwrap_or(0.0);
        for &before in &task.after {
            if let (Some(path), Some(earlier)) = (paths.get_mut(before), tasks.get(before)) {
                *path = path.max(earlier.duration + behind);
            }
        }
    }
    paths
}

/// Plays the graph. `known` says whether the scheduler knows the durations, as it does in all but a first run.
///
/// # Errors
/// If a task needs more than the machine has.
pub fn simulate(tasks: &[SimulatedTask], machine: &Machine, known: bool) -> Result<Timeline, Unfit> {
    let mut scheduler = Scheduler::new(machine);
    let priorities = remaining_paths(tasks);
    let mut open: Vec<usize> = tasks.iter().map(|task| task.after.len()).collect();
    let mut unlocks: Vec<Vec<usize>> = vec![Vec::new(); tasks.len()];
    for (index, task) in tasks.iter().enumerate() {
        for &before in &task.after {
            if let Some(list) = unlocks.get_mut(before) {
                list.push(index);
            }
        }
    }
    let ready = |scheduler: &mut Scheduler, index: usize| match (tasks.get(index), priorities.get(index)) {
        (Some(task), Some(&priority)) => scheduler.add(Task {
            id: TaskId(index),
            request: task.request,
            priority,
            estimate: known.then_some(task.duration),
        }),
        _ => Ok(()),
    };
    for (index, count) in open.iter().enumerate() {
        if *count == 0 {
            ready(&mut scheduler, index)?;
        }
    }
    let mut timeline = Timeline { makespan: 0.0, spans: Vec::with_capacity(tasks.len()) };
    // Ends by time. Durations are not negative, and the bits of such numbers sort as they do.
    let mut ends: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    let mut now = 0.0;
    loop {
        for Start { id: TaskId(task), lease } in scheduler.start(now) {
            let to = now + tasks.get(task).map_or(0.0, |t| t.duration.max(0.0));
            timeline.spans.push(Span { task, from: now, to, lease });
            ends.push(Reverse((to.to_bits(), task)));
        }
        let Some(Reverse((end, _))) = ends.peek().copied() else { break };
        now = f64::from_bits(end);
        timeline.makespan = now;
        while let Some(Reverse((_, task))) = ends.peek().copied().filter(|Reverse((t, _))| *t == end) {
            ends.pop();
            scheduler.finish(TaskId(task));
            for &unlocked in unlocks.get(task).into_iter().flatten() {
                if let Some(count) = open.get_mut(unlocked) {
                    *count -= 1;
                    if *count == 0 {
                        ready(&mut scheduler, unlocked)?;
                    }
                }
            }
        }
    }
    Ok(timeline)
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

    fn task(gpus: u32, duration: f64, after: &[usize]) -> SimulatedTask {
        SimulatedTask {
            request: Request { cpus: 1, memory: 0, gpus, gpu_memory: None },
            duration,
            after: after.to_vec(),
        }
    }

    #[test]
    fn a_sweep_packs_onto_the_gpus() {
        // A preparation, then eight cells of ten seconds with a two-second evaluation on the CPU each.
        let mut tasks = vec![task(0, 1.0, &[])];
        for _ in 0..8 {
            tasks.push(task(1, 10.0, &[0]));
            tasks.push(task(0, 2.0, &[tasks.len() - 1]));
        }
        let timeline = simulate(&tasks, &machine(16, 4), true).unwrap();
        assert_eq!(timeline.makespan, 1.0 + 2.0 * 10.0 + 2.0);
        assert!((0..4).all(|gpu| timeline.on_gpu(gpu).count() == 2));
        assert!((timeline.gpu_busy(0) - 20.0 / 23.0).abs() < 1e-12);
        let alone = simulate(&tasks, &machine(1, 1), true).unwrap();
        assert_eq!(alone.makespan, 1.0 + 8.0 * 12.0);
    }

    #[test]
    fn a_task_that_cannot_fit_is_an_error() {
        let error = simulate(&[task(0, 1.0, &[]), task(2, 1.0, &[0])], &machine(1, 1), true).unwrap_err();
        assert_eq!(error.to_string(), "needs 2 GPUs, and the machine has 1 GPU");
    }

    proptest! {
        /// The makespan lies between what any schedule needs and Graham's bound for list scheduling of single-core
        /// tasks (Bounds on multiprocessing timing anomalies, 1969).
        #[test]
        fn makespans_are_sane(
            shape in prop::collection::vec((1u32..100, prop::collection::vec(any::<prop::sample::Index>(), 0..3)), 1..40),
            known in any::<bool>(),
        ) {
            let tasks: Vec<SimulatedTask> = shape.iter().enumerate().map(|(i, (duration, after))| {
                let mut after: Vec<usize> = after.iter().filter(|_| i > 0).map(|a| a.index(i.max(1))).collect();
                after.sort_unstable();
                after.dedup();
                task(0, f64::from(*duration), &after)
            }).collect();
            let timeline = simulate(&tasks, &machine(3, 0), known).unwrap();
            prop_assert_eq!(timeline.spans.len(), tasks.len());
            let work: f64 = tasks.iter().map(|t| t.duration).sum();
            let path = remaining_paths(&tasks).into_iter().fold(0.0, f64::max);
            prop_assert!(timeline.makespan >= path.max(work / 3.0) - 1e-9);
            prop_assert!(timeline.makespan <= work / 3.0 + path * 2.0 / 3.0 + 1e-9);
            for span in &timeline.spans {
                for before in &tasks[span.task].after {
                    let ended = timeline.spans.iter().find(|s| s.task == *before).map(|s| s.to);
                    prop_assert!(ended.is_some_and(|t| t <= span.from));
                }
            }
        }
    }
}
