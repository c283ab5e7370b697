//! The environment of a worker: clean, so that a stage sees what it declares and not what a shell happens to hold.
//!
//! | variables | why |
//! |---|---|
//! | [`BASE`], `LC_*` | finding programs, temporary files, certificates, text in the user's language |
//! | [`BUILT_IN`], `HF_*`, `GRLM_*` (not for `command`) | where models lie; diagnostics |
//! | `CUDA_VISIBLE_DEVICES` | the lease; empty when no GPU is leased |
//! | [`THREADS`] | the leased cores |
//! | `GRLM_ATTEMPT`, `GRLM_SCRATCH` | for programs that save and resume |
//! | `GRLM_OUT_OF_MEMORY` | how often memory ran out before: for programs that can do with less |
//! | `env`, `pass_env`, `secrets` | what the pipeline declares; wins over all of the above |

use std::ffi::{OsStr, OsString};

use super::{AttemptSpec, Redactor};

/// Passed on to every worker when set.
pub const BASE: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "XDG_CACHE_HOME",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
];

/// Passed on to stages of grlm's own when set: they never change a result.
pub const BUILT_IN: &[&str] =
    &["CUDA_HOME", "CUDA_PATH", "RUST_BACKTRACE", "RUST_LIB_BACKTRACE", "TRANSFORMERS_OFFLINE"];

/// Set to the number of leased cores.
pub const THREADS: &[&str] = &["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"];

/// Variables a worker gets, given those of this process. Later entries win over earlier ones of the same name.
pub fn environment(
    spec: &AttemptSpec,
    own: impl IntoIterator<Item = (OsString, OsString)>,
) -> Vec<(OsString, OsString)> {
    let built_in = spec.kind != "command";
    let mut result = Vec::new();
    let mut declared = Vec::new();
    for (name, value) in own {
        let Some(text) = name.to_str() else { continue };
        if spec.pass_env.iter().chain(&spec.secrets).any(|n| n == text) {
            declared.push((name, value));
        } else if BASE.contains(&text)
            || text.starts_with("LC_")
            || (built_in
                && (BUILT_IN.contains(&text)
                    || text.starts_with("HF_")
                    || text.starts_with("GRLM_")
                    || text.starts_with("NVIDIA_")))
        {
            result.push((name, value));
        }
    }
    let mut set = |name: &str, value: &OsStr| result.push((name.into(), value.to_owned()));
    set("CUDA_VISIBLE_DEVICES", spec.visible_devices.join(",").as_ref());
    set("CUDA_DEVICE_ORDER", "PCI_BUS_ID".as_ref());
    for name in THREADS {
        set(name, spec.threads.to_string().as_ref());
    }
    set("GRLM_ATTEMPT", spec.attempt.to_string().as_ref());
    set("GRLM_OUT_OF_MEMORY", spec.out_of_memory.to_string().as_ref());
    set("GRLM_SCRATCH", spec.scratch.as_os_str());
    for (name, value) in &spec.env {
        set(name, value.as_ref());
    }
    result.extend(declared);
    result
}

/// Blanks the values that the spec's secrets have in this process.
pub fn redactor(spec: &AttemptSpec) -> Redactor {
    use std::os::unix::ffi::OsStringExt;
    Redactor::new(spec.secrets.iter().filter_map(std::env::var_os).map(OsString::into_vec))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::Path};

    use super::*;

    #[test]
    fn only_declared_variables_pass() {
        let own = ["PATH", "LC_ALL", "HF_HOME", "TRANSFORMERS_OFFLINE", "TOKEN", "OTHER", "SEED", "OMP_NUM_THREADS"];
        let own = || own.into_iter().map(|n| (OsString::from(n), OsString::from(format!("own {n}"))));
        let mut spec =
            AttemptSpec::new("s", "command", serde_json::Value::Null, Path::new("/w"), Path::new("/scratch"));
        spec.threads = 3;
        spec.secrets.push("TOKEN".into());
        spec.env.insert("SEED".into(), "7".into());
        let get = |spec: &AttemptSpec| environment(spec, own()).into_iter().collect::<BTreeMap<OsString, OsString>>();
        let command = get(&spec);
        assert_eq!(command[OsStr::new("PATH")], "own PATH");
        assert_eq!(command[OsStr::new("LC_ALL")], "own LC_ALL");
        assert_eq!(command[OsStr::new("TOKEN")], "own TOKEN");
        assert_eq!(command[OsStr::new("SEED")], "7");
        assert_eq!(command[OsStr::new("OMP_NUM_THREADS")], "3");
        assert_eq!(command[OsStr::new("CUDA_VISIBLE_DEVICES")], "");
        assert!(!command.contains_key(OsStr::new("OTHER")) && !command.contains_key(OsStr::new("HF_HOME")));
        spec.kind = "tid".into();
        // Whatever says where the hub is, and whether it may be asked, holds for the worker too.
        for name in ["HF_HOME", "TRANSFORMERS_OFFLINE"] {
            assert_eq!(get(&spec)[OsStr::new(name)], *format!("own {name}"));
        }
    }
}
