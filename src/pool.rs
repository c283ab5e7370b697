//! What stages are leased: cores and GPUs, all at once or not at all.
//!
//! A request that waited longest is never overtaken for a GPU by a later one: while it waits, later requests get only
//! what it could not use anyway.

use grlm_stages::Resources;

/// A GPU that may be leased.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// UUID or number, as `CUDA_VISIBLE_DEVICES` takes it.
    pub name: String,
    /// Bytes.
    pub memory: u64,
}

/// Cores and GPUs, and which of them are free.
#[derive(Debug, Clone)]
pub struct Pool {
    cpus: usize,
    gpus: Vec<Gpu>,
    free_cpus: usize,
    /// Free bytes of each GPU.
    free_gpu: Vec<u64>,
}

/// What one attempt holds; give it back with [`Pool::release`].
#[derive(Debug, Clone, Default)]
pub struct Lease {
    pub cpus: usize,
    /// Index of the GPU and bytes taken of it.
    gpus: Vec<(usize, u64)>,
    /// Names of the GPUs.
    pub devices: Vec<String>,
}

/// A wrong `--devices`.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no choice of devices")]
pub struct WrongDevices(String);

impl WrongDevices {
    pub const HELP: &str = "say `none`, numbers as `0,2`, or `sim:8x80GiB` for made-up devices";
}

impl Pool {
    pub fn new(cpus: usize, gpus: Vec<Gpu>) -> Self {
        let free_gpu = gpus.iter().map(|g| g.memory).collect();
        Self { cpus: cpus.max(1), gpus, free_cpus: cpus.max(1), free_gpu }
    }

    /// What there is, and where nothing is said, what `nvidia-smi` finds.
    ///
    /// # Errors
    /// `devices` is not understood, or names a GPU that is not there.
    pub fn detect(devices: Option<&str>) -> Result<Self, WrongDevices> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let gpus = match devices {
            Some("none") => Vec::new(),
            Some(text) if text.starts_with("sim:") => simulated(&text[4..]).ok_or_else(|| WrongDevices(text.into()))?,
            None => found(),
            Some(text) => {
                let all = found();
                let chosen = |n: &str| all.get(n.trim().parse::<usize>().ok()?).cloned();
                text.split(',').map(chosen).collect::<Option<Vec<_>>>().ok_or_else(|| WrongDevices(text.into()))?
            }
        };
        Ok(Self::new(cpus, gpus))
    }

    /// Why a request can never be met, if it cannot.
    pub fn never_fits(&self, wanted: &Resources) -> Option<String> {
        let gpus = wanted.gpus as usize;
        let enough = |memory: u64| self.gpus.iter().filter(|g| g.memory >= memory).count();
        if gpus > self.gpus.len() {
            return Some(format!("it needs {gpus} GPUs and there are {}", self.gpus.len()));
        }
        match wanted.gpu_memory {
            Some(memory) if enough(memory) < gpus => Some(format!(
                "it needs {} on each of {gpus} GPUs and {} have that much",
                crate::events::human_bytes(memory),
                enough(memory)
            )),
            _ => None,
        }
    }

    /// Leases what is wanted, or nothing. More cores than there are means all of them.
    pub fn lease(&mut self, wanted: &Resources) -> Option<Lease> {
        let cpus = (wanted.cpus as usize).clamp(1, self.cpus);
        if cpus > self.free_cpus {
            return None;
        }
        let mut gpus = Vec::new();
        for (i, gpu) in self.gpus.iter().enumerate() {
            let bytes = wanted.gpu_memory.unwrap_or(gpu.memory);
            if gpus.len() < wanted.gpus as usize && self.free_gpu[i] >= bytes {
                gpus.push((i, bytes));
            }
        }
        if gpus.len() < wanted.gpus as usize {
            return None;
        }
        self.free_cpus -= cpus;
        for &(i, bytes) in &gpus {
            self.free_gpu[i] -= bytes;
        }
        let devices = gpus.iter().map(|&(i, _)| self.gpus[i].name.clone()).collect();
        Some(Lease { cpus, gpus, devices })
    }

    pub fn release(&mut self, lease: Lease) {
        self.free_cpus += lease.cpus;
        for (i, bytes) in lease.gpus {
            self.free_gpu[i] += bytes;
        }
    }

    /// Chooses, of requests in order of priority, those that start now; returns their places in `waiting`.
    ///
    /// Once a request has to wait, what it needs of GPUs is set aside for it: a later one starts only if the waiting
    /// one could not start even with everything that is free now.
    pub fn start(&mut self, waiting: &[Resources]) -> Vec<(usize, Lease)> {
        let mut started = Vec::new();
        let mut gpus_reserved = false;
        for (place, wanted) in waiting.iter().enumerate() {
            if self.free_cpus == 0 {
                break;
            }
            if gpus_reserved && wanted.gpus > 0 {
                continue;
            }
            match self.lease(wanted) {
                Some(lease) => started.push((place, lease)),
                None if wanted.gpus > 0 => gpus_reserved = true,
                // The first that wants more cores than are free gets the next ones.
                None => break,
            }
        }
        started
    }
}

/// `8x80GiB`.
fn simulated(text: &str) -> Option<Vec<Gpu>> {
    let (count, memory) = text.split_once('x')?;
    let count: usize = count.parse().ok().filter(|&n| n <= 1024)?;
    let gib: u64 = memory.strip_suffix("GiB")?.parse().ok()?;
    let memory = gib.checked_mul(1 << 30)?;
    Some((0..count).map(|i| Gpu { name: format!("sim-{i}"), memory }).collect())
}

fn found() -> Vec<Gpu> {
    let query = ["--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"];
    let Ok(output) = std::process::Command::new("nvidia-smi").args(query).output() else { return Vec::new() };
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| {
            let (uuid, mebibytes) = line.split_once(',')?;
            Some(Gpu { name: uuid.trim().into(), memory: mebibytes.trim().parse::<u64>().ok()? << 20 })
        })
        .enumerate()
        .filter(|(i, gpu)| match &visible {
            Some(list) => list.split(',').any(|v| v.trim() == i.to_string() || v.trim() == gpu.name),
            None => true,
        })
        .map(|(_, gpu)| gpu)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(cpus: u32, gpus: u32, gib: Option<u64>) -> Resources {
        Resources { cpus, gpus, gpu_memory: gib.map(|g| g << 30), memory: 0 }
    }

    fn pool() -> Pool {
        Pool::new(4, simulated("2x80GiB").unwrap())
    }

    #[test]
    fn gpus_are_whole_shared_or_several_at_once() {
        let mut pool = pool();
        let half = pool.lease(&wants(1, 1, Some(40))).unwrap();
        let other_half = pool.lease(&wants(1, 1, Some(40))).unwrap();
        assert_eq!(half.devices, other_half.devices);
        assert!(pool.lease(&wants(1, 2, None)).is_none(), "a gang starts whole or not at all");
        pool.release(half);
        pool.release(other_half);
        assert_eq!(pool.lease(&wants(1, 2, None)).unwrap().devices, ["sim-0", "sim-1"]);
    }

    #[test]
    fn small_requests_do_not_starve_a_large_one() {
        let mut pool = pool();
        let small = pool.lease(&wants(1, 1, None)).unwrap();
        let started = pool.start(&[wants(1, 2, None), wants(1, 1, None), wants(1, 0, None)]);
        let places: Vec<usize> = started.iter().map(|(p, _)| *p).collect();
        assert_eq!(places, [2], "the second GPU is set aside; a stage without one goes ahead");
        pool.release(small);
        assert_eq!(pool.start(&[wants(1, 2, None), wants(1, 1, None)]).first().map(|(p, _)| *p), Some(0));
    }

    #[test]
    fn what_can_never_fit_is_told() {
        let pool = pool();
        assert!(pool.never_fits(&wants(1, 3, None)).unwrap().contains("needs 3 GPUs and there are 2"));
        assert!(pool.never_fits(&wants(1, 1, Some(81))).is_some());
        assert!(pool.never_fits(&wants(64, 2, Some(80))).is_none(), "more cores than there are means all");
    }

    #[test]
    fn devices_are_read_or_refused() {
        assert_eq!(simulated("8x80GiB").unwrap().len(), 8);
        for wrong in ["8", "x", "8x80", "ax80GiB", "99999x1GiB"] {
            assert!(simulated(wrong).is_none(), "{wrong}");
        }
        assert!(Pool::detect(Some("sim:0x")).is_err());
    }

    proptest::proptest! {
        #[test]
        fn never_oversubscribed_and_everything_finishes(jobs in proptest::collection::vec((1u32..6, 0u32..3, 0u64..3), 1..40)) {
            let mut pool = pool();
            let mut waiting: Vec<Resources> =
                jobs.iter().map(|&(c, g, m)| wants(c, g, (m > 0).then_some(m * 30))).collect();
            let mut running: Vec<Lease> = Vec::new();
            let mut steps = 0;
            while !(waiting.is_empty() && running.is_empty()) {
                let started = pool.start(&waiting);
                for (place, lease) in started.into_iter().rev() {
                    waiting.remove(place);
                    running.push(lease);
                }
                let used: usize = running.iter().map(|l| l.cpus).sum();
                proptest::prop_assert!(used <= 4);
                for gpu in 0..2 {
                    let bytes: u64 = running.iter().flat_map(|l| &l.gpus).filter(|(i, _)| *i == gpu).map(|(_, b)| b).sum();
                    proptest::prop_assert!(bytes <= 80 << 30);
                }
                proptest::prop_assert!(!running.is_empty(), "something must run");
                pool.release(running.remove(0));
                steps += 1;
                proptest::prop_assert!(steps < 1000);
            }
        }
    }
}
