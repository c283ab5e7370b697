//! Leases across the runs of one machine, so that two of them never share a GPU by accident, nor cores and memory.
//!
//! Each run keeps a file of what it holds in a folder of this host, and holds a lock on that file as long as it
//! lives. A file that nobody has locked belongs to a run that died: the kernel heals leases, no clock is involved.
//! Taking more happens under a second lock, held for microseconds; giving back needs none.

use std::{
    collections::BTreeMap,
    env, fs,
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::events::human_bytes;

use super::{
    Machine,
    pool::{GpuUsage, Usage},
};

/// The folder of leases cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct HostError {
    pub action: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HostError {
    move |source| HostError { action, path: path.to_owned(), source }
}

/// What one run holds, as it stands in its file.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Held {
    pid: u32,
    cpus: u32,
    memory: u64,
    /// By UUID.
    gpus: BTreeMap<String, HeldGpu>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct HeldGpu {
    shares: u32,
    memory: u64,
    whole: bool,
}

/// This run's side of the leases of its machine.
#[derive(Debug)]
pub struct HostLeases {
    folder: PathBuf,
    path: PathBuf,
    file: File,
    gate: File,
    /// UUIDs by position; empty for simulated GPUs, which are nobody else's business.
    uuids: Vec<String>,
}

/// The right to take more; others wait until it is dropped.
pub struct Taking<'a> {
    leases: &'a mut HostLeases,
}

/// `grlm` in `XDG_RUNTIME_DIR`, or `/tmp/grlm-<uid>` if that is not set or (after `su`, say) not this user's.
pub fn default_folder() -> PathBuf {
    let own = rustix::process::getuid().as_raw();
    let is_own = |folder: &PathBuf| fs::metadata(folder).is_ok_and(|m| m.is_dir() && m.uid() == own);
    match env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(is_own) {
        Some(folder) => folder.join("grlm"),
        None => PathBuf::from(format!("/tmp/grlm-{own}")),
    }
}

impl HostLeases {
    /// # Errors
    /// If the folder cannot be written, or belongs to another user.
    pub fn open(folder: &Path, machine: &Machine) -> Result<Self, HostError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at("create", folder))?;
        let owner = fs::metadata(folder).map_err(at("read", folder))?.uid();
        if owner != rustix::process::getuid().as_raw() {
            let taken = io::Error::other("it belongs to another user; set XDG_RUNTIME_DIR to a folder of your own");
            return Err(at("use", folder)(taken));
        }
        let open = |path: &Path| {
            let file = OpenOptions::new().create(true).read(true).write(true).truncate(false).open(path);
            file.map_err(at("open", path))
        };
        let gate_path = folder.join("gate");
        let gate = open(&gate_path)?;
        // Under the gate, or another run could take the file for a dead one's between its creation and its lock.
        gate.lock().map_err(at("lock", &gate_path))?;
        let (path, file) = loop {
            let path = folder.join(format!("run-{:016x}", rand_name()));
            if !path.exists() {
                let file = open(&path)?;
                file.lock().map_err(at("lock", &path))?;
                break (path, file);
            }
        };
        gate.unlock().map_err(at("unlock", &gate_path))?;
        let uuid = |gpu: &super::Gpu| if gpu.simulated { String::new() } else { gpu.uuid.clone() };
        let uuids = machine.gpus.iter().map(uuid).collect();
        Ok(Self { folder: folder.to_owned(), path, file, gate, uuids })
    }

    /// Waits for other runs that are just taking theirs.
    ///
    /// # Errors
    /// If locking fails.
    pub fn lock(&mut self) -> Result<Taking<'_>, HostError> {
        self.gate.lock().map_err(at("lock", &self.folder.join("gate")))?;
        Ok(Taking { leases: self })
    }

    /// Says what this run holds now, when that is less than before.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn give_back(&mut self, own: &Usage) -> Result<(), HostError> {
        self.write(own)
    }

    fn write(&mut self, own: &Usage) -> Result<(), HostError> {
        let gpus = (self.uuids.iter().zip(&own.gpus))
            .filter(|(uuid, gpu)| !uuid.is_empty() && (gpu.whole || gpu.shares > 0))
            .map(|(uuid, gpu)| (uuid.clone(), HeldGpu { shares: gpu.shares, memory: gpu.memory, whole: gpu.whole }))
            .collect();
        let held = Held { pid: std::process::id(), cpus: own.cpus, memory: own.memory, gpus };
        let mut write = || -> io::Result<()> {
            let mut text = serde_json::to_vec(&held)?;
            text.push(b'\n');
            // One write over the old text, then cut: a reader in between sees trailing garbage, never a gap.
            self.file.rewind()?;
            self.file.write_all(&text)?;
            self.file.set_len(text.len() as u64)
        };
        write().map_err(at("write", &self.path))
    }

    /// What every run of this machine holds now, in words: process and what it has. For people; nothing is locked.
    pub fn survey(folder: &Path) -> Vec<(u32, String)> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let is_run = entry.file_name().to_str().is_some_and(|name| name.starts_with("run-"));
            let Some(mut file) = File::open(entry.path()).ok().filter(|_| is_run) else { continue };
            let mut text = String::new();
            // A shared lock is refused only where a run lives that holds its own.
            let lives = matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock));
            if !lives || file.read_to_string(&mut text).is_err() {
                continue;
            }
            let Some(held) = text.lines().next().and_then(|l| serde_json::from_str::<Held>(l).ok()) else { continue };
            let mut parts = vec![format!("{} cores", held.cpus)];
            parts.extend((held.memory > 0).then(|| human_bytes(held.memory)));
            parts.extend(held.gpus.iter().map(|(uuid, gpu)| match gpu.whole {
                true => format!("{uuid} whole"),
                false => format!("{} of {uuid}", human_bytes(gpu.memory)),
            }));
            found.push((held.pid, parts.join(", ")));
        }
        found
    }

    /// What the other runs hold. Files of dead ones are removed.
    fn others(&self) -> Result<Usage, HostError> {
        let mut usage = Usage { gpus: vec![GpuUsage::default(); self.uuids.len()], ..Usage::default() };
        for entry in fs::read_dir(&self.folder).map_err(at("read", &self.folder))? {
            let path = entry.map_err(at("read", &self.folder))?.path();
            let is_run = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("run-"));
            if !is_run || path == self.path {
                continue;
            }
            let Ok(mut file) = OpenOptions::new().read(true).write(true).open(&path) else { continue };
            match file.try_lock() {
                Ok(()) => {
                    let _ = fs::remove_file(&path);
                    continue;
                }
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(at("lock", &path)(error)),
            }
            let mut text = String::new();
            file.read_to_string(&mut text).map_err(at("read", &path))?;
            let Some(held) = text.lines().next().and_then(|l| serde_json::from_str::<Held>(l).ok()) else { continue };
            usage.cpus = usage.cpus.saturating_add(held.cpus);
            usage.memory = usage.memory.saturating_add(held.memory);
            for (uuid, theirs) in held.gpus {
                let Some(index) = self.uuids.iter().position(|u| *u == uuid) else { continue };
                let Some(gpu) = usage.gpus.get_mut(index) else { continue };
                gpu.shares = gpu.shares.saturating_add(theirs.shares);
                gpu.memory = gpu.memory.saturating_add(theirs.memory);
                gpu.whole |= theirs.whole;
            }
        }
        Ok(usage)
    }
}

impl Drop for HostLeases {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Taking<'_> {
    /// What the other runs of this machine hold.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn others(&self) -> Result<Usage, HostError> {
        self.leases.others()
    }

    /// Says what this run holds from now on.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn commit(self, own: &Usage) -> Result<(), HostError> {
        self.leases.write(own)
    }
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        let _ = self.leases.gate.unlock();
    }
}

/// A name that no other run has; `open` checks that.
fn rand_name() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Gpu;

    fn machine() -> Machine {
        let gpu = |i: usize| Gpu { name: format!("gpu{i}"), uuid: format!("GPU-{i}"), memory: 80, simulated: i == 2 };
        Machine { cpus: 4, memory: 100, gpus: (0..3).map(gpu).collect() }
    }

    fn usage() -> Usage {
        let whole = GpuUsage { whole: true, ..GpuUsage::default() };
        let shared = GpuUsage { shares: 2, memory: 30, whole: false };
        Usage { cpus: 3, memory: 50, gpus: vec![whole, shared, whole] }
    }

    #[test]
    fn runs_see_what_others_hold_until_they_give_it_back_or_end() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = HostLeases::open(folder.path(), &machine()).unwrap();
        let mut second = HostLeases::open(folder.path(), &machine()).unwrap();
        first.lock().unwrap().commit(&usage()).unwrap();
        let mut expected = usage();
        expected.gpus[2] = GpuUsage::default();
        assert_eq!(second.lock().unwrap().others().unwrap(), expected, "all but the simulated GPU");
        assert!(first.lock().unwrap().others().unwrap().is_empty(), "not its own");
        let less = Usage { cpus: 1, ..Usage::default() };
        first.give_back(&less).unwrap();
        assert_eq!(second.lock().unwrap().others().unwrap().cpus, 1);
        drop(first);
        assert!(second.lock().unwrap().others().unwrap().is_empty());
    }

    #[test]
    fn what_a_dead_run_held_is_free_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut leases = HostLeases::open(folder.path(), &machine()).unwrap();
        let dead = folder.path().join("run-dead");
        fs::write(&dead, r#"{"pid":1,"cpus":4,"memory":100,"gpus":{}}"#).unwrap();
        assert!(leases.lock().unwrap().others().unwrap().is_empty());
        assert!(!dead.exists());
    }
}
