//! Naming a process so that a later one of the same number, of another boot or another machine, is not taken for it.

use std::fs;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

/// A process of this or an earlier boot of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub host: String,
    pub boot: String,
    pub pid: u32,
    /// Clock ticks between boot and the process's start: tells it from a later one of the same number.
    pub start: u64,
}

impl ProcessId {
    pub fn own() -> ProcessId {
        let pid = std::process::id();
        ProcessId { host: host(), boot: boot_id().to_owned(), pid, start: start_of(pid).unwrap_or(0) }
    }

    /// Whether it still runs; `None` if that cannot be seen from here (another machine).
    pub fn is_alive(&self) -> Option<bool> {
        if self.host != host() {
            return None;
        }
        Some(self.boot == boot_id() && start_of(self.pid) == Some(self.start))
    }
}

fn host() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// The kernel's name for the present boot; empty where it gives none. A test of power cuts may claim another one.
pub(crate) fn boot_id() -> &'static str {
    static BOOT: OnceLock<String> = OnceLock::new();
    BOOT.get_or_init(|| {
        crate::steps::claimed_boot().unwrap_or_else(|| {
            let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
            text.trim().to_owned()
        })
    })
}

/// Field 22 of `/proc/PID/stat`; the name in field 2 may hold anything, so counting starts behind its bracket. A
/// zombie counts as gone.
fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_process_is_seen_as_dead() {
        let own = ProcessId::own();
        assert_eq!(own.is_alive(), Some(true));
        assert_eq!(ProcessId { start: own.start + 1, ..own.clone() }.is_alive(), Some(false));
        assert_eq!(ProcessId { boot: "earlier".into(), ..own.clone() }.is_alive(), Some(false));
        assert_eq!(ProcessId { host: "elsewhere".into(), ..own }.is_alive(), None);
    }
}
