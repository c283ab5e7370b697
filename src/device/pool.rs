//! Accounting for cores, memory and GPUs: who holds what, what would fit. A pure state machine.
//!
//! A request is granted whole or not at all. More cores than there are is no mistake, the stage just gets all of
//! them; memory and GPUs that are not there are one. A GPU is leased whole, or shared by memory. Among GPUs that
//! fit, the fullest are taken, so that whole ones stay free.

use grlm_stages::Resources;

use super::Machine;
use crate::events::human_bytes;

/// What an attempt asks for. The same as [`Resources`], but exact and ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Request {
    pub cpus: u32,
    pub memory: u64,
    pub gpus: u32,
    /// On each GPU; `None` takes it whole.
    pub gpu_memory: Option<u64>,
}

impl From<Resources> for Request {
    fn from(r: Resources) -> Self {
        Self { cpus: r.cpus, memory: r.memory, gpus: r.gpus, gpu_memory: r.gpu_memory.filter(|_| r.gpus > 0) }
    }
}

/// What an attempt was given; returned with [`Pool::release`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub cpus: u32,
    pub memory: u64,
    /// Positions in [`Machine::gpus`].
    pub gpus: Vec<usize>,
    /// On each of them; `None` is all of it.
    pub gpu_memory: Option<u64>,
}

/// A request that can never be granted on this machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("needs {needs}, and the machine has {has}")]
pub struct Unfit {
    pub needs: String,
    pub has: String,
}

/// What is in use of one GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GpuUsage {
    /// The lessees that share it.
    pub shares: u32,
    /// What they hold, in bytes.
    pub memory: u64,
    /// Someone holds all of it.
    pub whole: bool,
}

/// What is in use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Usage {
    pub cpus: u32,
    pub memory: u64,
    /// By position in [`Machine::gpus`]; missing positions are free.
    pub gpus: Vec<GpuUsage>,
}

impl Usage {
    fn gpu(&self, index: usize) -> GpuUsage {
        self.gpus.get(index).copied().unwrap_or_default()
    }

    pub fn is_empty(&self) -> bool {
        self.cpus == 0 && self.memory == 0 && self.gpus.iter().all(|gpu| gpu.shares == 0 && !gpu.whole)
    }

    fn add(&mut self, lease: &Lease) {
        self.cpus += lease.cpus;
        self.memory += lease.memory;
        for &index in &lease.gpus {
            if self.gpus.len() <= index {
                self.gpus.resize(index + 1, GpuUsage::default());
            }
            let Some(gpu) = self.gpus.get_mut(index) else { continue };
            match lease.gpu_memory {
                Some(memory) => {
                    gpu.shares += 1;
                    gpu.memory += memory;
                }
                None => gpu.whole = true,
            }
        }
    }

    fn subtract(&mut self, lease: &Lease) {
        self.cpus = self.cpus.saturating_sub(lease.cpus);
        self.memory = self.memory.saturating_sub(lease.memory);
        for &index in &lease.gpus {
            let Some(gpu) = self.gpus.get_mut(index) else { continue };
            match lease.gpu_memory {
                Some(memory) => {
                    gpu.shares = gpu.shares.saturating_sub(1);
                    gpu.memory = gpu.memory.saturating_sub(memory);
                }
                None => gpu.whole = false,
            }
        }
    }
}

/// What a machine has, and what of it is in use by this run and by others.
#[derive(Debug, Clone)]
pub struct Pool {
    cpus: u32,
    memory: u64,
    gpus: Vec<u64>,
    /// Positions of GPUs that are gone.
    lost: std::collections::BTreeSet<usize>,
    own: Usage,
    foreign: Usage,
}

impl Pool {
    pub fn new(machine: &Machine) -> Self {
        Self {
            cpus: machine.cpus.max(1),
            memory: machine.memory,
            gpus: machine.gpus.iter().map(|gpu| gpu.memory).collect(),
            lost: std::collections::BTreeSet::new(),
            own: Usage::default(),
            foreign: Usage::default(),
        }
    }

    /// What this run holds.
    pub fn own(&self) -> &Usage {
        &self.own
    }

    pub fn foreign(&self) -> &Usage {
        &self.foreign
    }

    /// Sets what other runs on this machine hold.
    pub fn set_foreign(&mut self, foreign: Usage) {
        self.foreign = foreign;
    }

    /// Takes a GPU out: it is never given again.
    pub fn lose(&mut self, index: usize) {
        self.lost.insert(index);
    }

    fn present(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.gpus.iter().copied().enumerate().filter(|(index, _)| !self.lost.contains(index))
    }

    /// The request as this machine grants it: at least one core, and no more than there are; a number for "all GPUs".
    pub fn clamp(&self, request: Request) -> Request {
        let gpus = match request.gpus {
            Resources::ALL_GPUS => {
                self.present().filter(|(_, memory)| *memory >= request.gpu_memory.unwrap_or(0)).count() as u32
            }
            number => number,
        };
        Request { cpus: request.cpus.clamp(1, self.cpus), gpus, ..request }
    }

    /// Whether the request could be granted if nothing was in use.
    ///
    /// # Errors
    /// What is asked for, and what there is.
    pub fn check(&self, request: Request) -> Result<(), Unfit> {
        let request = self.clamp(request);
        if request.memory > self.memory {
            let (needs, has) = (human_bytes(request.memory), human_bytes(self.memory));
            return Err(Unfit { needs: format!("{needs} of memory"), has });
        }
        let large = request.gpu_memory.map_or(0, |m| m);
        let present: Vec<u64> = self.present().map(|(_, memory)| memory).collect();
        let enough = present.iter().filter(|memory| **memory >= large).count();
        if enough >= request.gpus as usize {
            return Ok(());
        }
        let plural = |n: usize| format!("{n} GPU{}", if n == 1 { "" } else { "s" });
        let needs = plural(request.gpus as usize);
        let has = if present.is_empty() { "none".to_owned() } else { plural(present.len()) };
        Err(match request.gpu_memory {
            Some(memory) if !present.is_empty() => {
                let sizes: Vec<String> = present.iter().map(|memory| human_bytes(*memory)).collect();
                Unfit {
                    needs: format!("{needs} with {} each", human_bytes(memory)),
                    has: format!("{has} with {}", sizes.join(", ")),
                }
            }
            _ => Unfit { needs, has },
        })
    }

    /// No core is free, and every lease needs one.
    pub fn is_full(&self) -> bool {
        self.own.cpus.saturating_add(self.foreign.cpus) >= self.cpus
    }

    /// What the request would get now. It is not taken yet: see [`Pool::take`].
    pub fn find(&self, request: Request) -> Option<Lease> {
        let Request { cpus, memory, gpus, gpu_memory } = self.clamp(request);
        let used = |own: u64, foreign: u64| own.saturating_add(foreign);
        let free = |total: u64, used: u64| total.saturating_sub(used);
        if u64::from(cpus) > free(self.cpus.into(), used(self.own.cpus.into(), self.foreign.cpus.into()))
            || memory > free(self.memory, used(self.own.memory, self.foreign.memory))
        {
            return None;
        }
        // Free memory and position of every GPU that fits.
        let mut fitting: Vec<(u64, usize)> = (self.present())
            .filter_map(|(index, total)| {
                let (own, foreign) = (self.own.gpu(index), self.foreign.gpu(index));
                if own.whole || foreign.whole {
                    return None;
                }
                let free = free(total, used(own.memory, foreign.memory));
                match gpu_memory {
                    Some(memory) => memory <= free,
                    None => own.shares == 0 && foreign.shares == 0,
                }
                .then_some((free, index))
            })
            .collect();
        if fitting.len() < gpus as usize {
            return None;
        }
        fitting.sort_unstable();
        fitting.truncate(gpus as usize);
        let mut gpus: Vec<usize> = fitting.into_iter().map(|(_, index)| index).collect();
        gpus.sort_unstable();
        Some(Lease { cpus, memory, gpus, gpu_memory })
    }

    /// Takes what [`Pool::find`] found.
    pub fn take(&mut self, lease: &Lease) {
        self.own.add(lease);
    }

    pub fn release(&mut self, lease: &Lease) {
        self.own.subtract(lease);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Gpu;

    fn pool(cpus: u32, gpus: &[u64]) -> Pool {
        let gpu = |memory: &u64| Gpu { name: String::new(), uuid: String::new(), memory: *memory, simulated: true };
        Pool::new(&Machine { cpus, memory: 100, gpus: gpus.iter().map(gpu).collect() })
    }

    fn gpus(gpus: u32, gpu_memory: Option<u64>) -> Request {
        Request { cpus: 1, memory: 0, gpus, gpu_memory }
    }

    #[test]
    fn gpus_are_whole_or_shared_and_shares_pack() {
        let mut pool = pool(8, &[80, 80]);
        let first = pool.find(gpus(1, Some(30))).unwrap();
        pool.take(&first);
        let second = pool.find(gpus(1, Some(50))).unwrap();
        assert_eq!(second.gpus, first.gpus, "the fuller one");
        pool.take(&second);
        assert_eq!(pool.find(gpus(2, Some(1))), None, "one is full");
        let whole = pool.find(gpus(1, None)).unwrap();
        assert_ne!(whole.gpus, first.gpus);
        pool.take(&whole);
        assert_eq!(pool.find(gpus(1, Some(0))).map(|l| l.gpus), Some(first.gpus.clone()), "never the whole one");
        pool.release(&first);
        assert_eq!(pool.find(gpus(1, None)), None, "a share is left");
        pool.release(&second);
        assert!(pool.find(gpus(1, None)).is_some());
    }

    #[test]
    fn a_lost_gpu_is_not_given_again() {
        let mut pool = pool(8, &[80, 80]);
        let lease = pool.find(gpus(1, None)).unwrap();
        pool.take(&lease);
        pool.lose(lease.gpus[0]);
        pool.release(&lease);
        assert_ne!(pool.find(gpus(1, None)).unwrap().gpus, lease.gpus);
        assert_eq!(pool.find(gpus(2, Some(1))), None);
        let text = pool.check(gpus(2, None)).unwrap_err().to_string();
        assert_eq!(text, "needs 2 GPUs, and the machine has 1 GPU");
    }

    #[test]
    fn what_others_hold_is_not_given() {
        let mut pool = pool(4, &[80]);
        let whole = GpuUsage { whole: true, ..GpuUsage::default() };
        pool.set_foreign(Usage { cpus: 3, memory: 60, gpus: vec![whole] });
        let request = |cpus, memory| Request { cpus, memory, gpus: 0, gpu_memory: None };
        assert!(pool.find(request(1, 40)).is_some());
        assert!(pool.find(request(2, 0)).is_none() && pool.find(request(1, 41)).is_none());
        assert!(pool.find(gpus(1, Some(1))).is_none());
    }

    #[test]
    fn what_can_never_fit_says_what_there_is() {
        let text = |request| pool(2, &[24 << 30, 80 << 30]).check(request).unwrap_err().to_string();
        assert_eq!(text(gpus(3, None)), "needs 3 GPUs, and the machine has 2 GPUs");
        let with = "needs 2 GPUs with 40.0 GiB each, and the machine has 2 GPUs with 24.0 GiB, 80.0 GiB";
        assert_eq!(text(gpus(2, Some(40 << 30))), with);
        let memory = Request { cpus: 1, memory: 101, gpus: 0, gpu_memory: None };
        assert_eq!(text(memory), "needs 101 B of memory, and the machine has 100 B");
        assert_eq!(pool(2, &[]).check(gpus(1, None)).unwrap_err().to_string(), "needs 1 GPU, and the machine has none");
        let many = Request { cpus: 64, memory: 0, gpus: 0, gpu_memory: None };
        assert_eq!(pool(2, &[]).check(many), Ok(()));
        assert_eq!(pool(2, &[]).find(many).map(|l| l.cpus), Some(2), "all the cores there are");
    }
}
