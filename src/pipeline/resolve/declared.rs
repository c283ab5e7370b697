//! What a stage declares beside its parameters: resources, outputs of its own, ports in its text, variables.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Component, Path, PathBuf},
};

use grlm_stages::{Artifact, Output, Resources};
use serde_json::Value;

use super::{Draft, check_port_name};
use crate::pipeline::{
    hint,
    mistake::{Mark, Mistake, below},
    repair::{keys, typed},
    spec::{DeclaredOutput, Shown, StageSpec},
    template::{Piece, PortReference, pieces, port_reference},
};

impl Draft {
    pub(super) fn override_resources(&mut self, spec: &StageSpec) {
        let wanted = &spec.resources;
        let resources = &mut self.resources;
        resources.share = wanted.share.unwrap_or(resources.share);
        resources.gpus = wanted.gpus.map_or(resources.gpus, |g| g.0);
        resources.cpus = wanted.cpus.unwrap_or(resources.cpus);
        resources.memory = wanted.memory.map_or(resources.memory, |m| m.0);
        if let Some(memory) = wanted.gpu_memory {
            resources.gpu_memory = Some(memory.0);
        }
        let undecided = resources.gpus == Resources::ALL_GPUS && self.kind.is_some_and(|k| k.floating_point());
        if undecided {
            let at = below(&self.at, &["resources", "gpus"]);
            let message = "results of this kind differ in their last bits between CPU and GPU: say how many GPUs";
            self.mistakes.push(Mistake::value(&at, message).help("a number; 0 computes on the CPU"));
        }
        if resources.cpus == 0 {
            let at = below(&self.at, &["resources", "cpus"]);
            self.mistakes.push(Mistake::value(&at, "a stage needs at least one core"));
        }
    }

    /// The outputs that a pipeline declares: names, and files that stay in the stage's folder and apart.
    pub(super) fn declare_outputs(&mut self, spec: &StageSpec) {
        let mut taken: Vec<(PathBuf, String)> = Vec::new();
        for (port, value) in &spec.outputs {
            let mut at = below(&self.at, &["outputs", port]);
            let declared = match value {
                Value::String(file) => Some(DeclaredOutput { file: file.clone(), may_be_empty: false }),
                Value::Object(_) => {
                    let declared = typed(value, &at, &HashSet::new(), &mut self.mistakes);
                    at.push("file".to_owned());
                    declared
                }
                other => {
                    self.mistakes.push(
                        Mistake::value(&at, format!("expected a file name, found {}", Shown(other)))
                            .help("for example `out: result.txt`, or `out: { file: result.txt, may_be_empty: true }`"),
                    );
                    None
                }
            };
            check_port_name(port, &below(&self.at, &["outputs", port]), &mut self.mistakes);
            let Some(declared) = declared else { continue };
            let file = match inside(&declared.file) {
                Ok(file) => file,
                Err(why) => {
                    self.mistakes.push(
                        Mistake::value(&at, format!("the output path `{}` {why}", declared.file))
                            .help("name a file in the stage's own folder, such as `result.txt`"),
                    );
                    continue;
                }
            };
            if let Some((other, first)) =
                taken.iter().find(|(other, _)| file.starts_with(other) || other.starts_with(&file))
            {
                let message = if *other == file {
                    format!("outputs `{first}` and `{port}` have the same path `{}`", declared.file)
                } else {
                    format!("one of the outputs `{first}` and `{port}` is inside the other")
                };
                self.mistakes.push(Mistake::value(&at, message).help("give each output a path of its own"));
            }
            let mut output = Output::new("", Artifact::Any, file.display().to_string(), "");
            output.name = port.clone().into();
            output.may_be_empty = declared.may_be_empty;
            self.outputs.push(output);
            taken.push((file, port.clone()));
        }
        if spec.outputs.is_empty() {
            self.mistakes.push(
                Mistake::key(&self.at, format!("stage `{}` declares no outputs", self.name))
                    .help("`outputs: { out: result.txt }`; its result is what it writes to `${outputs.out}`"),
            );
        }
    }

    /// The ports that the text of a `command` names.
    pub(super) fn check_run(&mut self, params: &Value, spec: &StageSpec) {
        let at = below(&self.at, &["with", "run"]);
        let Some(run) = params.get("run").and_then(Value::as_str) else { return };
        for piece in pieces(run) {
            let Piece::Reference(reference) = piece else { continue };
            let (port, known, side) = match port_reference(reference) {
                Some(PortReference::Input(port)) => (port, &spec.inputs, "input"),
                Some(PortReference::Output(port)) => (port, &spec.outputs, "output"),
                None => continue,
            };
            if !known.contains_key(port) {
                let help = hint::help(port, known.keys().map(String::as_str))
                    .unwrap_or_else(|| format!("declare it under `{side}s`"));
                self.mistakes.push(
                    Mistake::new(
                        &at,
                        Mark::Text(format!("${{{reference}}}")),
                        format!("stage `{}` has no {side} `{port}`", self.name),
                    )
                    .help(help),
                );
            }
        }
    }

    /// A stage sees only what is declared. `env` will not do: its values are written down.
    pub(super) fn check_secrets(&mut self, wanted: BTreeMap<String, String>, spec: &StageSpec) {
        for (parameter, name) in wanted {
            if !spec.secrets.contains(&name) && !spec.pass_env.contains(&name) {
                let at = below(&below(&self.at, &["with"]), &keys(&parameter));
                self.mistakes.push(
                    Mistake::value(&at, format!("the variable `{name}` is not passed on to the stage"))
                        .help(format!("declare it at the stage: `secrets: [{name}]`")),
                );
            }
        }
    }

    pub(super) fn check_environment(&mut self, spec: &StageSpec) {
        for (block, names) in [("env", &spec.env), ("pass_env", &spec.pass_env), ("secrets", &spec.secrets)] {
            for (i, name) in names.iter().enumerate() {
                let mut characters = name.chars();
                let first = characters.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
                if !first || !characters.all(|c| c.is_ascii_alphanumeric() || c == '_') {
                    self.mistakes.push(
                        Mistake::value(
                            &below(&self.at, &[block, &i.to_string()]),
                            format!("`{name}` is not the name of an environment variable"),
                        )
                        .help("names only; values come from the environment that `grlm` runs in"),
                    );
                }
            }
        }
        // Values in `env` are part of the key, and so are written down in the store.
        for (i, name) in spec.env.iter().enumerate() {
            for (block, names) in [("secrets", &spec.secrets), ("pass_env", &spec.pass_env)] {
                if names.contains(name) {
                    let at = below(&self.at, &["env", &i.to_string()]);
                    let message = format!("`{name}` is in `env` and in `{block}`");
                    let help = "name it once: values of `env` are written down in the store, the others' are not";
                    self.mistakes.push(Mistake::value(&at, message).help(help));
                }
            }
        }
    }
}

/// A path that stays inside the stage's folder.
fn inside(file: &str) -> Result<PathBuf, &'static str> {
    if file.trim().is_empty() {
        return Err("is empty");
    }
    let mut clean = PathBuf::new();
    for component in Path::new(file).components() {
        match component {
            Component::Normal(part) => clean.push(part),
            Component::CurDir => {}
            Component::ParentDir => return Err("leaves the stage's folder"),
            Component::RootDir | Component::Prefix(_) => return Err("is absolute"),
        }
    }
    if file.chars().any(char::is_control) {
        return Err("has control characters in it");
    }
    if clean.as_os_str().is_empty() { Err("names the folder itself") } else { Ok(clean) }
}
