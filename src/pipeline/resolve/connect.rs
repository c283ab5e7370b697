//! Inputs: from which stage's output or which file each of them comes.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
};

use grlm_stages::Artifact;
use rustc_hash::FxHashMap;
use serde_json::Value;

use super::{Draft, check_port_name};
use crate::pipeline::{
    InputSource, hint,
    mistake::{Mistake, below},
    repair::typed,
    spec::{FileInput, Shown},
};

/// Connects a stage's inputs.
pub(super) fn connect(
    draft: &Draft,
    drafts: &[Draft],
    by_name: &FxHashMap<&str, usize>,
    mistakes: &mut Vec<Mistake>,
) -> BTreeMap<String, InputSource> {
    let mut connected = BTreeMap::new();
    let Some(spec) = &draft.spec else { return connected };
    for (port, value) in &spec.inputs {
        let at = below(&draft.at, &["inputs", port]);
        let wanted = draft
            .ports
            .as_ref()
            .map(|ports| ports.inputs.iter().find(|i| i.name == *port).map(|i| i.artifact).or(ports.open_inputs));
        match wanted {
            Some(None) => {
                let known = draft.ports.iter().flat_map(|p| &p.inputs).map(|i| i.name.as_ref());
                mistakes.push(
                    Mistake::key(&at, format!("`{}` has no input `{port}`", spec.uses))
                        .maybe_help(hint::help(port, known)),
                );
                continue;
            }
            Some(Some(_)) => check_port_name(port, &at, mistakes),
            None => {}
        }
        let source = match value {
            Value::String(reference) => stage_output(reference, &at, wanted.flatten(), port, drafts, by_name, mistakes),
            Value::Object(_) => typed::<FileInput>(value, &at, &HashSet::new(), mistakes).and_then(|input| {
                if input.file.is_empty() {
                    mistakes.push(Mistake::value(&below(&at, &["file"]), "the path is empty"));
                    return None;
                }
                Some(InputSource::File(PathBuf::from(input.file)))
            }),
            other => {
                mistakes.push(
                    Mistake::value(&at, format!("expected a stage's output or a file, found {}", Shown(other)))
                        .help("write `stage`, `stage.output`, or `{ file: PATH }`"),
                );
                None
            }
        };
        if let Some(source) = source {
            connected.insert(port.clone(), source);
        }
    }
    for input in draft.ports.iter().flat_map(|p| &p.inputs) {
        if input.required && !spec.inputs.contains_key(input.name.as_ref()) {
            let at = if spec.inputs.is_empty() { draft.at.clone() } else { below(&draft.at, &["inputs"]) };
            mistakes.push(
                Mistake::key(&at, format!("stage `{}` needs the input `{}`", draft.name, input.name))
                    .help(format!("it holds {}: {}", input.artifact, input.doc)),
            );
        }
    }
    connected
}

/// `stage` or `stage.output`.
fn stage_output(
    reference: &str,
    at: &[String],
    wanted: Option<Artifact>,
    port: &str,
    drafts: &[Draft],
    by_name: &FxHashMap<&str, usize>,
    mistakes: &mut Vec<Mistake>,
) -> Option<InputSource> {
    let (stage_name, output_name) = match reference.split_once('.') {
        Some((stage, output)) => (stage, Some(output)),
        None => (reference, None),
    };
    let Some(&stage) = by_name.get(stage_name) else {
        let help = if reference.contains('/') || Path::new(reference).exists() {
            Some(format!("for a file write `{{ file: {reference} }}`"))
        } else if mistakes.len() < 200 {
            hint::help(stage_name, drafts.iter().map(|d| d.name.as_str()))
        } else {
            None
        };
        mistakes.push(Mistake::value(at, format!("unknown stage `{stage_name}`")).maybe_help(help));
        return None;
    };
    let upstream = &drafts[stage];
    // What is wrong with the upstream is said there.
    upstream.ports.as_ref()?;
    let names = || upstream.outputs.iter().map(|o| o.name.as_ref());
    let output = match (output_name, upstream.outputs.as_slice()) {
        (None, [_]) => 0,
        (None, []) => return None,
        (None, outputs) => {
            // The one output whose type the port wants, if any, is the likely meaning.
            let mut fitting = outputs.iter().filter(|o| wanted == Some(o.artifact));
            let likely = match (fitting.next(), fitting.next()) {
                (Some(one), None) => format!("write `{stage_name}.{}`; ", one.name),
                _ => String::new(),
            };
            let known = names().collect::<Vec<_>>().join(", ");
            mistakes.push(
                Mistake::value(at, format!("stage `{stage_name}` has several outputs"))
                    .help(format!("{likely}its outputs: {known}")),
            );
            return None;
        }
        (Some(name), outputs) => match outputs.iter().position(|o| o.name == name) {
            Some(output) => output,
            None => {
                mistakes.push(
                    Mistake::value(at, format!("stage `{stage_name}` has no output `{name}`"))
                        .maybe_help(hint::help(name, names())),
                );
                return None;
            }
        },
    };
    let given = upstream.outputs[output].artifact;
    if let Some(wanted) = wanted
        && !wanted.accepts(given)
    {
        let fitting: Vec<String> = upstream
            .outputs
            .iter()
            .filter(|o| wanted.accepts(o.artifact))
            .map(|o| format!("`{stage_name}.{}`", o.name))
            .collect();
        mistakes.push(
            Mistake::value(at, format!("input `{port}` takes {wanted}, but `{reference}` holds {given}"))
                .maybe_help((!fitting.is_empty()).then(|| format!("{} would fit", fitting.join(" or ")))),
        );
    }
    Some(InputSource::Stage { stage, output })
}
