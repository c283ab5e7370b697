//! Leases across the runs of one machine, so that two of them never share a GPU by accident, nor cores and memory.
//!
//! Each run keeps a file of what it holds in a folder of this host, and holds a lock on that file as long as it
//! lives, and its workers after it: they hold the file open. A file that nobody has locked belongs to a run that died and
//! whose workers are gone: the kernel heals leases, no clock is involved.
//! Taking more happens under a second lock, held for microseconds; giving back needs none.
//!
//! The folder is one for all users of the machine ([`Place`]): everybody may add a file of their own, read and lock all,
//! and remove only their own. Where there can be no such folder, the runs of one user alone see each other, and say so.

use std::{
    collections::BTreeMap,
    env, fs,
    fs::{File, OpenOptions, Permissions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
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
    file: Arc<File>,
    gate: File,
    /// UUIDs by position; empty for simulated GPUs, which are nobody else's business.
    uuids: Vec<String>,
}

/// The right to take more; others wait until it is dropped.
pub struct Taking<'a> {
    leases: &'a mut HostLeases,
}

/// Where the leases of this machine lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub folder: PathBuf,
    /// Why only this user's runs take part, if that is so.
    pub alone: Option<String>,
}

/// Every user may make files in it, and none may remove another's.
const FOR_ALL: u32 = 0o1777;
/// Where such folders may be made: the first is emptied when the machine starts, the second is everywhere.
const ROOMS: [&str; 2] = ["/run/lock", "/tmp"];

impl Place {
    /// The folder that `GRLM_LEASES` names; else `grlm-leases` in `/run/lock` or `/tmp`, which is made if it is missing,
    /// and open to all users of the machine; else one of this user's own.
    pub fn of_this_machine() -> Self {
        match env::var_os("GRLM_LEASES").filter(|folder| !folder.is_empty()) {
            Some(folder) => Self { folder: folder.into(), alone: None },
            None => Self::find(&ROOMS.map(Path::new), own_folder),
        }
    }

    fn find(rooms: &[&Path], own: impl FnOnce() -> PathBuf) -> Self {
        let mut reasons = Vec::new();
        for room in rooms {
            let folder = room.join("grlm-leases");
            match shared(&folder) {
                Ok(()) => return Self { folder, alone: None },
                Err(reason) => reasons.push(format!("{}: {reason}", folder.display())),
            }
        }
        Self { folder: own(), alone: Some(reasons.join("; ")) }
    }
}

/// Makes the folder for all users, unless somebody has.
fn shared(folder: &Path) -> Result<(), String> {
    let look = || fs::symlink_metadata(folder);
    let there = look().or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => make_shared(folder).and_then(|()| look()),
        _ => Err(error),
    });
    let there = there.map_err(|error| error.to_string())?;
    if !there.is_dir() || there.mode() & 0o7777 != FOR_ALL {
        return Err("it is no folder that all users may write to, and none may remove another's from".into());
    }
    open_lock(&folder.join("gate")).map(|_| ()).map_err(|error| format!("gate: {error}"))
}

/// Makes it under another name first: the umask takes rights away, and whoever found it before they are back would take
/// it for one user's, and do without as long as it runs.
fn make_shared(folder: &Path) -> io::Result<()> {
    let room = folder.parent().unwrap_or(folder);
    let made = tempfile::Builder::new().prefix(".grlm-leases-").tempdir_in(room)?;
    create(&made.path().join("gate"))?;
    fs::set_permissions(made.path(), Permissions::from_mode(FOR_ALL))?;
    match renameat_with(CWD, made.path(), CWD, folder, RenameFlags::NOREPLACE) {
        Ok(()) => {
            let _ = made.keep();
            Ok(())
        }
        // Somebody was faster.
        Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// `grlm` in `XDG_RUNTIME_DIR`, or `/tmp/grlm-<uid>` if that is not set or (after `su`, say) not this user's.
fn own_folder() -> PathBuf {
    let own = rustix::process::getuid().as_raw();
    let is_own = |folder: &PathBuf| fs::metadata(folder).is_ok_and(|m| m.is_dir() && m.uid() == own);
    match env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(is_own) {
        Some(folder) => folder.join("grlm"),
        None => PathBuf::from(format!("/tmp/grlm-{own}")),
    }
}

/// Opens a file that locks are taken on, and makes it if it is missing. Reading is all that a lock needs, and the
/// kernel may refuse more of a file of another user's in a folder of all (`fs.protected_regular`).
fn open_lock(path: &Path) -> io::Result<File> {
    loop {
        match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => match create(path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                created => return created,
            },
            opened => return opened,
        }
    }
}

/// Makes a file that all users may read, whatever the umask.
fn create(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().create_new(true).read(true).write(true).mode(0o644).open(path)?;
    file.set_permissions(Permissions::from_mode(0o644))?;
    Ok(file)
}

impl HostLeases {
    /// # Errors
    /// If the folder cannot be written, or is another user's alone.
    pub fn open(folder: &Path, machine: &Machine) -> Result<Self, HostError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at("create", folder))?;
        let there = fs::metadata(folder).map_err(at("read", folder))?;
        if there.uid() != rustix::process::getuid().as_raw() && there.mode() & 0o7777 != FOR_ALL {
            let taken = io::Error::other("it belongs to another user; GRLM_LEASES names another place");
            return Err(at("use", folder)(taken));
        }
        let gate_path = folder.join("gate");
        let gate = open_lock(&gate_path).map_err(at("open", &gate_path))?;
        // Under the gate, or another run could take the file for a dead one's between its creation and its lock.
        gate.lock().map_err(at("lock", &gate_path))?;
        let (path, file) = loop {
            let path = folder.join(format!("run-{:016x}", rand_name()));
            match create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                created => {
                    let file = created.map_err(at("create", &path))?;
                    file.lock().map_err(at("lock", &path))?;
                    break (path, file);
                }
            }
        };
        gate.unlock().map_err(at("unlock", &gate_path))?;
        let uuid = |gpu: &super::Gpu| if gpu.simulated { String::new() } else { gpu.uuid.clone() };
        let uuids = machine.gpus.iter().map(uuid).collect();
        Ok(Self { folder: folder.to_owned(), path, file: Arc::new(file), gate, uuids })
    }

    /// The file whose lock says that this run's leases hold. They hold until nobody has it open any more.
    pub fn held(&self) -> Arc<File> {
        Arc::clone(&self.file)
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
        let mut file = &*self.file;
        let mut write = || -> io::Result<()> {
            let mut text = serde_json::to_vec(&held)?;
            text.push(b'\n');
            // One write over the old text, then cut: a reader in between sees trailing garbage, never a gap.
            file.rewind()?;
            file.write_all(&text)?;
            file.set_len(text.len() as u64)
        };
        write().map_err(at("write", &self.path))
    }

    /// [`HostLeases::survey`] without this run.
    pub fn survey_others(&self) -> Vec<String> {
        Self::survey_but(&self.folder, Some(&self.path))
    }

    /// What every run of this machine holds now, in words, a sentence each. For people; nothing is locked.
    pub fn survey(folder: &Path) -> Vec<String> {
        Self::survey_but(folder, None)
    }

    fn survey_but(folder: &Path, own: Option<&Path>) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let is_run = entry.file_name().to_str().is_some_and(|name| name.starts_with("run-"));
            let is_wanted = is_run && own.is_none_or(|own| entry.path() != own);
            let Some(mut file) = File::open(entry.path()).ok().filter(|_| is_wanted) else { continue };
            let mut text = String::new();
            // A shared lock is refused only where a run, or a worker of it, lives that holds its own.
            let lives = matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock));
            if !lives || file.read_to_string(&mut text).is_err() {
                continue;
            }
            let Some(held) = text.lines().next().and_then(|l| serde_json::from_str::<Held>(l).ok()) else { continue };
            let mut parts = vec![format!("{} core{}", held.cpus, if held.cpus == 1 { "" } else { "s" })];
            parts.extend((held.memory > 0).then(|| human_bytes(held.memory)));
            parts.extend(held.gpus.iter().map(|(uuid, gpu)| match gpu.whole {
                true => format!("{uuid} whole"),
                false => format!("{} of {uuid}", human_bytes(gpu.memory)),
            }));
            let run = rustix::process::Pid::from_raw(held.pid.cast_signed());
            let died = run.is_none_or(|run| rustix::process::test_kill_process(run) == Err(Errno::SRCH));
            let parts = parts.join(", ");
            found.push(match died {
                true => format!("workers of process {}, which is gone, hold {parts}", held.pid),
                false => format!("process {} holds {parts}", held.pid),
            });
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
            // Another user's cannot be written.
            let Ok(mut file) = File::open(&path) else { continue };
            match file.try_lock() {
                Ok(()) => {
                    // Another user's stays, and counts for nothing.
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
    fn the_folder_is_for_all_users() {
        let room = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        let folder = room.path().join("grlm-leases");
        let place = Place::find(&[room.path()], || unreachable!("the room will do"));
        assert_eq!(place, Place { folder: folder.clone(), alone: None });
        assert_eq!(mode(&folder), FOR_ALL);
        let leases = HostLeases::open(&folder, &machine()).unwrap();
        assert_eq!((mode(&folder.join("gate")), mode(&leases.path)), (0o644, 0o644));
        // As another user's file is: it can be read and locked, and no more.
        fs::set_permissions(folder.join("gate"), Permissions::from_mode(0o444)).unwrap();
        fs::set_permissions(&leases.path, Permissions::from_mode(0o444)).unwrap();
        let mut leases = leases;
        leases.lock().unwrap().commit(&usage()).unwrap();
        let mut other = HostLeases::open(&folder, &machine()).unwrap();
        assert_eq!(other.lock().unwrap().others().unwrap().cpus, 3);
    }

    #[test]
    fn runs_that_make_the_folder_at_once_all_use_it() {
        for _ in 0..50 {
            let room = tempfile::tempdir().unwrap();
            let place = || Place::find(&[room.path()], || unreachable!("the room will do"));
            let start = std::sync::Barrier::new(4);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        start.wait();
                        assert_eq!(place().alone, None);
                    });
                }
            });
            let names: Vec<_> = fs::read_dir(room.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, ["grlm-leases"], "nothing temporary is left");
        }
    }

    #[test]
    fn what_a_run_held_stays_taken_while_its_file_is_open() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = HostLeases::open(folder.path(), &machine()).unwrap();
        let mut second = HostLeases::open(folder.path(), &machine()).unwrap();
        first.lock().unwrap().commit(&usage()).unwrap();
        // As a killed run leaves it: the file is there, and only a worker has it open.
        let left = folder.path().join("run-killed");
        fs::hard_link(&first.path, &left).unwrap();
        let worker = first.held().try_clone().unwrap();
        drop(first);
        assert_eq!(second.lock().unwrap().others().unwrap().cpus, 3);
        drop(worker);
        // A process that another test starts has a copy for a moment.
        let free = (0..2000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            second.lock().unwrap().others().unwrap().is_empty()
        });
        assert!(free && !left.exists());
    }

    #[test]
    fn a_folder_that_is_not_for_all_is_left_with_a_reason() {
        let room = tempfile::tempdir().unwrap();
        let (taken, missing) = (room.path().join("taken"), room.path().join("missing"));
        fs::create_dir_all(taken.join("grlm-leases")).unwrap();
        fs::set_permissions(taken.join("grlm-leases"), Permissions::from_mode(0o755)).unwrap();
        let own = room.path().join("own");
        let place = Place::find(&[&missing, &taken], || own.clone());
        assert_eq!(place.folder, own);
        let reason = place.alone.unwrap();
        assert!(reason.contains("missing/grlm-leases: ") && reason.contains("no folder that all users"), "{reason}");
        std::os::unix::fs::symlink(room.path(), room.path().join("grlm-leases")).unwrap();
        assert!(shared(&room.path().join("grlm-leases")).is_err(), "a link leads anywhere");
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
