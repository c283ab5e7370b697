//! How much memory a worker and what it started hold on the GPUs that were leased to it: looked at again and again.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use super::nvml::Nvml;

/// Between two looks. Peaks that are shorter may be missed; allocators of deep-learning libraries keep what they took.
const EVERY: Duration = Duration::from_millis(200);

/// Watches until it is dropped.
pub struct Sampler {
    peak: Arc<AtomicU64>,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Sampler {
    /// Watches the processes of group `group` on the GPUs with these UUIDs.
    pub fn start(uuids: Vec<String>, group: u32) -> Self {
        let peak = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = mpsc::channel();
        let most = peak.clone();
        let thread = std::thread::spawn(move || {
            let Ok(nvml) = Nvml::open() else { return };
            while stopped.recv_timeout(EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
                for uuid in &uuids {
                    let held = nvml.memory_by_process(uuid).unwrap_or_default();
                    most.fetch_max(held_by(&held, group), Ordering::Relaxed);
                }
            }
        });
        Self { peak, stop: Some(stop), thread: Some(thread) }
    }

    /// The most that was held on one GPU, in bytes; `None` if nothing was ever seen.
    pub fn peak(&self) -> Option<u64> {
        Some(self.peak.load(Ordering::Relaxed)).filter(|peak| *peak > 0)
    }
}

fn held_by(held: &BTreeMap<u32, u64>, group: u32) -> u64 {
    held.iter().filter(|(pid, _)| **pid == group || group_of(**pid) == Some(group)).map(|(_, bytes)| bytes).sum()
}

/// Field 5 of `/proc/PID/stat`; the name in field 2 may hold anything.
fn group_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(2)?.parse().ok()
}

impl Drop for Sampler {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_groups_processes_count() {
        let own = std::process::id();
        let group = group_of(own).unwrap();
        assert_eq!(
            held_by(&BTreeMap::from([(own, 5), (1, 7)]), group),
            if group_of(1) == Some(group) { 12 } else { 5 }
        );
        assert_eq!(group_of(u32::MAX), None);
    }
}
