//! `grlm stages`: every kind, documented from its own types.

use grlm_stages::StageKind;
use serde_json::{Value, json};

use crate::{error::CliError, exit_codes::Code};

/// Document the kinds of stages, their ports and parameters
#[derive(Debug, clap::Args)]
pub struct Args {
    /// One kind, in full
    kind: Option<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<Code, CliError> {
    let Some(name) = &args.kind else {
        if args.json {
            let all: Vec<Value> = grlm_stages::kinds().iter().map(|k| describe(*k)).collect();
            println!("{}", Value::Array(all));
            return Ok(Code::Ok);
        }
        let width = grlm_stages::kinds().iter().map(|k| k.name().len()).max().unwrap_or(0);
        for kind in grlm_stages::kinds() {
            println!("{:<width$}  {}", kind.name(), kind.summary());
        }
        return Ok(Code::Ok);
    };
    let Some(kind) = grlm_stages::kind(name) else {
        let nearest = grlm_stages::kinds()
            .iter()
            .map(|k| k.name())
            .max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
        let help = nearest.map(|n| format!("did you mean `{n}`? `grlm stages` lists all"));
        return Err(CliError::message(Code::Usage, format!("there is no stage kind `{name}`"), help));
    };
    if args.json {
        println!("{}", describe(kind));
        return Ok(Code::Ok);
    }
    println!("{}: {}", kind.name(), kind.summary());
    match kind.resolve_params(&Value::Null).and_then(|params| kind.ports(&params)) {
        Ok(ports) => {
            println!("\ninputs");
            for input in &ports.inputs {
                let need = if input.required { "" } else { ", optional" };
                println!("  {} ({}{need})  {}", input.name, input.artifact, input.doc);
            }
            if let Some(artifact) = ports.open_inputs {
                println!("  any name ({artifact})");
            }
            println!("\noutputs");
            for output in &ports.outputs {
                println!("  {} ({}, {})  {}", output.name, output.artifact, output.file, output.doc);
            }
            if ports.open_outputs {
                println!("  declared by the pipeline: `outputs: {{ name: file }}`");
            }
        }
        Err(_) => println!("\nits ports depend on parameters that have no default"),
    }
    println!("\nparameters (`with:`)");
    let schema = kind.params_schema().to_value();
    print_parameters(&schema, &schema, 1);
    Ok(Code::Ok)
}

fn describe(kind: &dyn StageKind) -> Value {
    json!({
        "kind": kind.name(),
        "summary": kind.summary(),
        "floating_point": kind.floating_point(),
        "parameters": kind.params_schema().to_value(),
    })
}

/// Follows `$ref` into `$defs`.
fn resolved<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    schema.get("$ref").and_then(Value::as_str).and_then(|r| root.pointer(r.trim_start_matches('#'))).unwrap_or(schema)
}

fn print_parameters(root: &Value, schema: &Value, depth: usize) {
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
    let indent = "  ".repeat(depth);
    for (name, property) in properties {
        let target = resolved(root, property);
        let kind = target.get("type").or_else(|| target.get("enum")).map(ToString::to_string).unwrap_or_default();
        let default = property.get("default").map(|d| format!(" = {d}")).unwrap_or_default();
        let doc = property.get("description").or_else(|| target.get("description")).and_then(Value::as_str);
        println!("{indent}{name}{default}  {}", kind.replace('"', ""));
        for line in doc.unwrap_or_default().lines() {
            println!("{indent}    {line}");
        }
        if depth < 3 {
            print_parameters(root, target, depth + 1);
        }
    }
}
