//! What the machine says of its memory, and the control groups that this process is in.

use std::{fs, path::Path};

/// All memory of the machine, or of the tightest control group, in bytes, where that can be found out.
pub fn total_memory() -> Option<u64> {
    figure("MemTotal:").into_iter().chain(groups().map(|group| group.limit)).min()
}

/// Memory that could be had without swapping, of the machine and of every control group, in bytes, where that can be
/// found out.
pub fn available_memory() -> Option<u64> {
    figure("MemAvailable:").into_iter().chain(groups().map(|group| group.limit.saturating_sub(group.used))).min()
}

fn figure(name: &str) -> Option<u64> {
    read(&fs::read_to_string("/proc/meminfo").ok()?, name)?.checked_mul(1024)
}

/// The number behind a name: of `/proc/meminfo`, where it counts KiB, or of a control group's `memory.stat`.
fn read(text: &str, name: &str) -> Option<u64> {
    let figure = text.lines().find_map(|line| line.strip_prefix(name))?.trim();
    figure.strip_suffix("kB").unwrap_or(figure).trim().parse().ok()
}

/// What a control group (version 2) may have, and has beyond what it can drop at once.
#[derive(Debug, PartialEq)]
struct Group {
    limit: u64,
    used: u64,
}

/// The groups with a limit, from this process's own outwards.
fn groups() -> impl Iterator<Item = Group> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default().to_owned();
    groups_in(Path::new("/sys/fs/cgroup"), &path).into_iter()
}

fn groups_in(root: &Path, path: &str) -> Vec<Group> {
    let group = |path: &Path| {
        let text = |name: &str| fs::read_to_string(root.join(path).join(name)).ok();
        let limit = text("memory.max")?.trim().parse().ok()?;
        let current: u64 = text("memory.current")?.trim().parse().ok()?;
        let droppable = text("memory.stat").and_then(|stat| read(&stat, "inactive_file ")).unwrap_or(0);
        Some(Group { limit, used: current.saturating_sub(droppable) })
    };
    Path::new(path).ancestors().filter_map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_by_their_names() {
        let text =
            "MemTotal:       24615632 kB\nMemFree:        1 kB\nMemAvailable:   100 kB\nHugePages_Total:  many\n";
        assert_eq!(read(text, "MemTotal:"), Some(24_615_632));
        assert_eq!(read(text, "MemAvailable:"), Some(100));
        assert_eq!(read(text, "HugePages_Total:"), None, "no number");
        assert!(available_memory() <= total_memory());
    }

    #[test]
    fn control_groups_are_read_from_the_own_one_outwards() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, name: &str, text: &str| {
            fs::create_dir_all(root.path().join(path)).unwrap();
            fs::write(root.path().join(path).join(name), text).unwrap();
        };
        put("jobs/mine", "memory.max", "max\n");
        put("jobs/mine", "memory.current", "5\n");
        put("jobs", "memory.max", "4000\n");
        put("jobs", "memory.current", "3000\n");
        put("jobs", "memory.stat", "anon 7\ninactive_file 900\n");
        put("", "memory.max", "9000\n");
        put("", "memory.current", "100\n");
        let found = groups_in(root.path(), "jobs/mine");
        assert_eq!(found, [Group { limit: 4000, used: 2100 }, Group { limit: 9000, used: 100 }]);
        assert!(groups_in(root.path(), "elsewhere").ends_with(&[Group { limit: 9000, used: 100 }]));
    }
}
