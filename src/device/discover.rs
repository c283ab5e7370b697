//! Finding out what this machine has.
//!
//! GPUs come from the driver's library, NVML, or where that cannot be loaded from `nvidia-smi`, which takes up to a
//! second or two: ask for them only when a stage wants one. `CUDA_VISIBLE_DEVICES` narrows them, as it does for CUDA.

use std::{env, io, process::Command};

use super::{
    Gpu, Machine, Selection,
    nvml::{Found, Nvml, NvmlError},
    parse_bytes,
};

/// Why the devices asked for cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DiscoverError {
    #[error("there is no GPU {number}")]
    NoSuchGpu { number: usize, found: String },
    #[error("cannot read what nvidia-smi says: `{line}`")]
    Unreadable { line: String },
    #[error("nvidia-smi failed: {message}")]
    Failed { message: String },
    #[error(transparent)]
    Nvml(#[from] NvmlError),
}

impl DiscoverError {
    /// What to do next.
    pub fn help(&self) -> String {
        match self {
            Self::NoSuchGpu { found, .. } => format!("found: {found}"),
            Self::Unreadable { .. } | Self::Failed { .. } | Self::Nvml(_) => {
                "`--devices none` runs without GPUs".into()
            }
        }
    }
}

/// This machine, with the selected GPUs; none are looked for if `with_gpus` is false and none are selected by number.
///
/// # Errors
/// If a selected GPU is not there, or `nvidia-smi` is there and does not work.
pub fn machine(selection: &Selection, with_gpus: bool) -> Result<Machine, DiscoverError> {
    let gpus = match selection {
        Selection::None => Vec::new(),
        Selection::Simulated(sizes) => simulated(sizes),
        Selection::All if !with_gpus => Vec::new(),
        Selection::All => visible(found()?, env::var("CUDA_VISIBLE_DEVICES").ok().as_deref()),
        Selection::Only(numbers) => only(&found()?, numbers)?,
    };
    // Without a figure there is nothing to account against.
    let memory = grlm_stages::machine::total_memory().unwrap_or(u64::MAX);
    Ok(Machine { cpus: cpus(), memory, gpus })
}

/// Number and GPU, of all that the driver shows; MIG instances have their GPU's number.
///
/// # Errors
/// If there is a driver and it does not answer.
pub fn found() -> Result<Vec<(usize, Gpu)>, DiscoverError> {
    match Nvml::open().and_then(|nvml| nvml.devices()) {
        Ok(found) => Ok(found.into_iter().map(numbered).collect()),
        // A driver's library that is elsewhere still has its tool.
        Err(NvmlError::Absent { .. } | NvmlError::Lacks { .. }) => nvidia_smi(),
        Err(error) if error.is_absence() => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

fn numbered(found: Found) -> (usize, Gpu) {
    let name = match found.instance {
        Some(instance) => format!("gpu{}.{instance}", found.index),
        None => format!("gpu{}", found.index),
    };
    (found.index, Gpu { name, uuid: found.uuid, memory: found.memory, simulated: false })
}

/// Those of these UUIDs that the driver does not show any more. None if it cannot be asked: that is no proof.
pub fn missing(uuids: &[String]) -> Vec<String> {
    if uuids.is_empty() {
        return Vec::new();
    }
    let Ok(found) = found() else { return Vec::new() };
    uuids.iter().filter(|uuid| !found.iter().any(|(_, gpu)| gpu.uuid == **uuid)).cloned().collect()
}

/// The GPUs with these numbers, in that order; all instances of one that is split.
fn only(found: &[(usize, Gpu)], numbers: &[usize]) -> Result<Vec<Gpu>, DiscoverError> {
    let mut chosen = Vec::new();
    for number in numbers {
        let before = chosen.len();
        chosen.extend(found.iter().filter(|(index, _)| index == number).map(|(_, gpu)| gpu.clone()));
        if chosen.len() == before {
            let mut all: Vec<String> = found.iter().map(|(index, _)| index.to_string()).collect();
            all.dedup();
            let found = if all.is_empty() { "no GPU".into() } else { all.join(", ") };
            return Err(DiscoverError::NoSuchGpu { number: *number, found });
        }
    }
    Ok(chosen)
}

fn simulated(sizes: &[u64]) -> Vec<Gpu> {
    let gpu = |(i, memory): (usize, &u64)| Gpu {
        name: format!("sim{i}"),
        uuid: format!("sim-{i}"),
        memory: *memory,
        simulated: true,
    };
    sizes.iter().enumerate().map(gpu).collect()
}

/// Cores this process may use: affinity and control groups considered.
fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

/// Number and GPU, of all that the driver shows. No `nvidia-smi` means no GPU.
pub fn nvidia_smi() -> Result<Vec<(usize, Gpu)>, DiscoverError> {
    let output = Command::new("nvidia-smi").args(["--query-gpu=index,uuid,memory.total", "--format=csv"]).output();
    let output = match output {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(DiscoverError::Failed { message: error.to_string() }),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        // A machine image with the tool and without a GPU.
        let message = format!("{}{}", text, String::from_utf8_lossy(&output.stderr)).trim().to_owned();
        let no_gpu = ["No devices were found", "couldn't communicate with the NVIDIA driver"];
        return if no_gpu.iter().any(|t| message.contains(t)) {
            Ok(Vec::new())
        } else {
            Err(DiscoverError::Failed { message })
        };
    }
    parse_nvidia_smi(&text)
}

fn parse_nvidia_smi(text: &str) -> Result<Vec<(usize, Gpu)>, DiscoverError> {
    let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("index"));
    let mut gpus = Vec::new();
    for line in lines {
        if line.contains("No devices were found") {
            continue;
        }
        let mut fields = line.split(',').map(str::trim);
        let mut read = || {
            let index: usize = fields.next()?.parse().ok()?;
            let uuid = fields.next().filter(|u| !u.is_empty())?.to_owned();
            let memory = parse_bytes(fields.next()?)?;
            Some((index, Gpu { name: format!("gpu{index}"), uuid, memory, simulated: false }))
        };
        gpus.push(read().ok_or_else(|| DiscoverError::Unreadable { line: line.to_owned() })?);
    }
    Ok(gpus)
}

/// Keeps what `CUDA_VISIBLE_DEVICES` shows, in its order: numbers, or UUIDs of GPUs and MIG instances, which may be
/// abbreviated. As in CUDA, the first entry that names nothing ends the list; a number takes the first instance of a
/// GPU that is split.
fn visible(found: Vec<(usize, Gpu)>, variable: Option<&str>) -> Vec<Gpu> {
    let Some(variable) = variable else { return found.into_iter().map(|(_, gpu)| gpu).collect() };
    let pick = |entry: &str| {
        let number = entry.parse::<usize>();
        let is_it = |(index, gpu): &&(usize, Gpu)| match &number {
            Ok(number) => index == number,
            Err(_) => !entry.is_empty() && gpu.uuid.starts_with(entry),
        };
        found.iter().find(is_it).map(|(_, gpu)| gpu.clone())
    };
    variable.split(',').map(str::trim).map_while(pick).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "index, uuid, memory.total [MiB]\n0, GPU-aaaa-1, 81559 MiB\n1, GPU-bbbb-2, 24576 MiB\n";

    #[test]
    fn nvidia_smi_is_read() {
        let gpus = parse_nvidia_smi(TWO).unwrap();
        assert_eq!(gpus.len(), 2);
        assert_eq!(gpus[1].1, {
            Gpu { name: "gpu1".into(), uuid: "GPU-bbbb-2".into(), memory: 24 << 30, simulated: false }
        });
        assert!(parse_nvidia_smi("No devices were found\n").unwrap().is_empty());
        assert!(parse_nvidia_smi("0, GPU-a, [N/A]\n").is_err());
    }

    #[test]
    fn cuda_visible_devices_chooses() {
        let names = |variable| -> Vec<String> {
            visible(parse_nvidia_smi(TWO).unwrap(), variable).into_iter().map(|gpu| gpu.name).collect()
        };
        assert_eq!(names(None), ["gpu0", "gpu1"]);
        assert_eq!(names(Some("1,0")), ["gpu1", "gpu0"]);
        assert_eq!(names(Some("GPU-bbbb")), ["gpu1"]);
        assert_eq!(names(Some("0,7,1")), ["gpu0"]);
        assert!(names(Some("")).is_empty() && names(Some("-1")).is_empty());
    }

    #[test]
    fn a_split_gpu_is_its_instances() {
        let found = |index, instance, uuid: &str| Found { index, instance, uuid: uuid.into(), memory: 10 };
        let all: Vec<(usize, Gpu)> =
            [found(0, Some(0), "MIG-a"), found(0, Some(1), "MIG-b"), found(1, None, "GPU-c")].map(numbered).to_vec();
        let names = |gpus: Vec<Gpu>| gpus.into_iter().map(|gpu| gpu.name).collect::<Vec<_>>();
        assert_eq!(names(only(&all, &[1, 0]).unwrap()), ["gpu1", "gpu0.0", "gpu0.1"]);
        assert_eq!(names(visible(all.clone(), Some("MIG-b,GPU-c"))), ["gpu0.1", "gpu1"]);
        let error = only(&all, &[2]).unwrap_err();
        assert_eq!(error.help(), "found: 0, 1");
    }

    #[test]
    fn this_machine_has_a_core_and_memory() {
        let machine = machine(&Selection::None, true).unwrap();
        assert!(machine.cpus >= 1 && machine.memory > 1 << 20 && machine.gpus.is_empty());
    }
}
