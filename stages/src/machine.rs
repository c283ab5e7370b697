//! What the machine says of its memory.

/// All memory of the machine, in bytes, where that can be found out.
pub fn total_memory() -> Option<u64> {
    figure("MemTotal:")
}

/// Memory that the machine could give without swapping, in bytes, where that can be found out.
pub fn available_memory() -> Option<u64> {
    figure("MemAvailable:")
}

fn figure(name: &str) -> Option<u64> {
    read(&std::fs::read_to_string("/proc/meminfo").ok()?, name)
}

fn read(text: &str, name: &str) -> Option<u64> {
    let figure = text.lines().find_map(|line| line.strip_prefix(name))?;
    figure.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_by_their_names() {
        let text = "MemTotal:       24615632 kB\nMemFree:        1 kB\nMemAvailable:   100 kB\nHugePages_Total:  0\n";
        assert_eq!(read(text, "MemTotal:"), Some(24_615_632 * 1024));
        assert_eq!(read(text, "MemAvailable:"), Some(100 * 1024));
        assert_eq!(read(text, "HugePages_Total:"), None, "no size");
        assert!(available_memory() <= total_memory());
    }
}
