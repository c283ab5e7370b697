//! What a machine has to run stages on: cores, memory, GPUs; found, chosen with `--devices`, or simulated.
//!
//! [`pool`] accounts for them within a run, [`host`] across the runs of a machine. Who gets them when is
//! [`crate::schedule`]'s business.

pub mod discover;
pub mod host;
pub mod nvml;
pub mod pool;
pub mod sampler;

use std::{fmt, str::FromStr};

use crate::events::human_bytes;

pub use pool::{Lease, Pool, Request, Unfit};

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// For people: `gpu0`, `sim3`.
    pub name: String,
    /// What the driver knows it by; names its leases on this host.
    pub uuid: String,
    /// In bytes.
    pub memory: u64,
    /// Not there: for planning, and for tests without hardware.
    pub simulated: bool,
}

/// Everything a run may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    pub cpus: u32,
    /// In bytes.
    pub memory: u64,
    pub gpus: Vec<Gpu>,
}

impl Machine {
    /// The value of `CUDA_VISIBLE_DEVICES` for a lease. Simulated GPUs take part in scheduling only: the stage sees
    /// none.
    pub fn visible_devices(&self, lease: &Lease) -> Vec<String> {
        let leased = lease.gpus.iter().filter_map(|i| self.gpus.get(*i));
        leased.filter(|gpu| !gpu.simulated).map(|gpu| gpu.uuid.clone()).collect()
    }

    /// Names of the leased GPUs, for events.
    pub fn names(&self, lease: &Lease) -> Vec<String> {
        lease.gpus.iter().filter_map(|i| self.gpus.get(*i)).map(|gpu| gpu.name.clone()).collect()
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |n: usize, one: &str| if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") };
        let cpus = plural(self.cpus as usize, "CPU");
        write!(f, "{cpus}, {} of memory, ", human_bytes(self.memory))?;
        match self.gpus.as_slice() {
            [] => f.write_str("no GPU"),
            gpus => {
                let mut sizes: Vec<String> = gpus.iter().map(|gpu| human_bytes(gpu.memory)).collect();
                let alike = sizes.len() > 1 && sizes.windows(2).all(|pair| pair[0] == pair[1]);
                if alike {
                    sizes.truncate(1);
                }
                let each = if alike { " each" } else { "" };
                write!(f, "{} ({}{each})", plural(gpus.len(), "GPU"), sizes.join(", "))
            }
        }
    }
}

/// The value of `--devices`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Selection {
    /// Every GPU that is found.
    #[default]
    All,
    /// No GPU.
    None,
    /// These, numbered as `nvidia-smi` does.
    Only(Vec<usize>),
    /// GPUs that are not there, by memory.
    Simulated(Vec<u64>),
}

impl FromStr for Selection {
    type Err = String;

    /// `all`, `none`, `0,2`, `sim:8` (of 80 GiB each), `sim:8x80GiB`, `sim:2x80GiB+4x24GiB`.
    fn from_str(text: &str) -> Result<Self, String> {
        const FORMS: &str = "expected `all`, `none`, numbers as in `0,2`, or `sim:8x80GiB`";
        match text {
            "all" => return Ok(Self::All),
            "none" => return Ok(Self::None),
            _ => {}
        }
        let Some(simulated) = text.strip_prefix("sim:") else {
            let mut numbers = Vec::new();
            for part in text.split(',') {
                let number = part.trim().parse().map_err(|_| format!("`{part}` is no device number: {FORMS}"))?;
                if numbers.contains(&number) {
                    return Err(format!("device {number} is named twice"));
                }
                numbers.push(number);
            }
            return Ok(Self::Only(numbers));
        };
        let mut sizes = Vec::new();
        for group in simulated.split('+') {
            let (count, size) = group.split_once('x').unwrap_or((group, "80GiB"));
            let count = count.parse().ok().filter(|n| (1..=1024).contains(n));
            let count: usize = count.ok_or_else(|| format!("`{group}` must name between 1 and 1024 devices"))?;
            // Bytes without a unit are a slip: nobody means a GPU of 80 of them.
            let size = parse_bytes(size)
                .filter(|bytes| *bytes > 0 && !size.ends_with(|c: char| c.is_ascii_digit()))
                .ok_or_else(|| format!("`{size}` is no size: {FORMS}"))?;
            sizes.extend(std::iter::repeat_n(size, count));
        }
        Ok(Self::Simulated(sizes))
    }
}

/// `80GiB`, `24 GB`, `512`, `1.5GiB`. `None` if it is none of these.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1_048_576.0,
        "g" | "gib" => 1_073_741_824.0,
        "t" | "tib" => 1_099_511_627_776.0,
        _ => return None,
    };
    let bytes = number.parse::<f64>().ok()? * scale;
    (bytes < 9e18).then_some(bytes.round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selections_are_read() {
        let read = |t: &str| t.parse::<Selection>();
        assert_eq!(read("none"), Ok(Selection::None));
        assert_eq!(read("0,2"), Ok(Selection::Only(vec![0, 2])));
        assert_eq!(read("sim:2x80GiB"), Ok(Selection::Simulated(vec![80 << 30; 2])));
        assert_eq!(read("sim:2"), read("sim:2x80GiB"));
        assert_eq!(read("sim:1x2KiB+2x1KiB"), Ok(Selection::Simulated(vec![2048, 1024, 1024])));
        for wrong in
            ["", "x", "0,0", "0,", "sim:", "sim:0x1GiB", "sim:99999x1GiB", "sim:2x0GiB", "sim:8x80", "sim:1x1PiB"]
        {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_read() {
        assert_eq!(
            ["80GiB", "24 GB", "512", "1.5KiB"].map(parse_bytes),
            [80 << 30, 24_000_000_000, 512, 1536].map(Some)
        );
        assert_eq!(["", "GiB", "1..2", "-1", "1e400", "9999999TiB"].map(parse_bytes), [None; 6]);
    }
}
