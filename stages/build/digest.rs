//! The walk over token streams behind [`write_code_digests`].

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// Modules that every stage names and that cannot change a result: what a stage *is*, how it talks to the engine,
/// and the list of kinds (which names every other stage).
const INFRASTRUCTURE: [&str; 6] =
    ["crate", "crate::stage", "crate::context", "crate::error", "crate::event", "crate::registry"];

/// How rows are looked up, shared out and kept cannot change a result either; a row stage has versions of its own.
fn is_infrastructure(module: &str) -> bool {
    INFRASTRUCTURE.contains(&module) || module == "crate::rows" || module.starts_with("crate::rows::")
}

/// Dependencies that compute: their locked version is part of the code of every stage that names them.
const COMPUTING: [&str; 9] = [
    "candle-core",
    "candle-nn",
    "candle-transformers",
    "gemm",
    "html-escape",
    "minijinja",
    "rand",
    "rand_chacha",
    "tokenizers",
];

struct Module {
    /// Token stream in canonical form: no comments, layout, documentation or tests.
    text: String,
    /// Paths it names, as written, with `self`, `super` and child modules resolved.
    names: BTreeSet<Vec<String>>,
    /// Names that it re-exports, and the full path of each.
    reexports: BTreeMap<String, Vec<String>>,
    /// The kind whose `impl Stage` stands here.
    kind: Option<String>,
}

/// Writes `code_digests.rs` into `OUT_DIR`: a table of kind and digest.
pub fn write_code_digests() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let lock = manifest.join("../Cargo.lock");
    for path in [manifest.join("src"), manifest.join("nn/src"), manifest.join("build"), lock.clone()] {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let mut modules = BTreeMap::new();
    read_crate(&manifest.join("src"), "crate", &mut modules);
    read_crate(&manifest.join("nn/src"), "grlm_nn", &mut modules);
    let versions = locked_versions(&lock);

    let mut table = String::from("static CODE_DIGESTS: &[(&str, &str)] = &[\n");
    for (path, module) in &modules {
        if let Some(kind) = &module.kind {
            let digest = digest(path, &modules, &versions);
            table.push_str(&format!("    ({kind:?}, {digest:?}),\n"));
        }
    }
    table.push_str("];\n");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")).join("code_digests.rs");
    fs::write(&out, table).unwrap_or_else(|e| panic!("cannot write {}: {e}", out.display()));
}

/// The digest of all modules reached from `start`, in the order of their paths, length-prefixed.
fn digest(start: &str, modules: &BTreeMap<String, Module>, versions: &BTreeMap<String, String>) -> String {
    let mut reached = BTreeSet::from([start.to_owned()]);
    let mut open = vec![start.to_owned()];
    while let Some(path) = open.pop() {
        for name in &modules[&path].names {
            if let Some(target) = resolve(name, modules, 0)
                && !is_infrastructure(&target)
                && reached.insert(target.clone())
            {
                open.push(target);
            }
        }
    }
    let mut hasher = blake3::Hasher::new();
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    let mut used = BTreeSet::new();
    for path in &reached {
        add(path);
        add(&modules[path].text);
        for krate in COMPUTING {
            let ident = krate.replace('-', "_");
            if modules[path].names.iter().any(|n| n[0] == ident) {
                used.insert(krate);
            }
        }
    }
    for krate in used {
        add(krate);
        add(versions.get(krate).map_or("unlocked", String::as_str));
    }
    hasher.finalize().to_hex().to_string()
}

/// The module that holds what `name` names: the longest prefix that is a module, looked for behind re-exports.
fn resolve(name: &[String], modules: &BTreeMap<String, Module>, depth: usize) -> Option<String> {
    let (len, path) = (1..=name.len()).rev().find_map(|n| {
        let path = name[..n].join("::");
        modules.contains_key(&path).then_some((n, path))
    })?;
    if depth < 8
        && let Some(next) = name.get(len)
        && let Some(target) = modules[&path].reexports.get(next)
    {
        return resolve(target, modules, depth + 1);
    }
    Some(path)
}

fn read_crate(src: &Path, root: &str, modules: &mut BTreeMap<String, Module>) {
    let mut files = Vec::new();
    list(src, &mut files);
    for file in files {
        let relative = file.strip_prefix(src).expect("listed below src").with_extension("");
        let mut path = vec![root.to_owned()];
        path.extend(relative.iter().map(|p| p.to_string_lossy().into_owned()));
        if matches!(path.last().map(String::as_str), Some("lib" | "mod")) {
            path.pop();
        }
        let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("cannot read {}: {e}", file.display()));
        // The compiler reports what does not lex, with a better message.
        let Ok(stream) = text.parse::<TokenStream>() else { continue };
        let mut module = read_module(&path, stream.clone());
        let mut included = Vec::new();
        find_included(stream, &mut included);
        for name in included {
            // A file that is not there is the compiler's to report.
            let path = file.with_file_name(name);
            println!("cargo::rerun-if-changed={}", path.display());
            module.text.push_str(&fs::read_to_string(path).unwrap_or_default());
        }
        modules.insert(path.join("::"), module);
    }
}

/// The paths in `include_str!("…")`: a stage's code as much as the module that names them.
fn find_included(stream: TokenStream, paths: &mut Vec<String>) {
    let tokens: Vec<_> = stream.into_iter().collect();
    for (i, token) in tokens.iter().enumerate() {
        let TokenTree::Group(group) = token else { continue };
        let included =
            i > 1 && is_punct(&tokens[i - 1], '!') && ident(tokens.get(i - 2)).as_deref() == Some("include_str");
        match group.stream().into_iter().next() {
            Some(TokenTree::Literal(path)) if included => paths.push(path.to_string().trim_matches('"').to_owned()),
            _ => find_included(group.stream(), paths),
        }
    }
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("cannot list {}: {e}", folder.display())) {
        let path = entry.expect("listed").path();
        if path.is_dir() {
            list(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

fn read_module(path: &[String], stream: TokenStream) -> Module {
    let tokens = strip(stream);
    let mut children = BTreeSet::new();
    let mut module = Module { text: String::new(), names: BTreeSet::new(), reexports: BTreeMap::new(), kind: None };
    find_children(&tokens, &mut children);
    collect_names(&tokens, path, &children, &mut module);
    module.kind = find_kind(&tokens);
    module.text = tokens.iter().cloned().collect::<TokenStream>().to_string();
    module
}

/// Drops documentation, and everything under `#[cfg(test)]`, at every depth.
fn strip(stream: TokenStream) -> Vec<TokenTree> {
    let mut out = Vec::new();
    let mut tokens = stream.into_iter().peekable();
    while let Some(token) = tokens.next() {
        if is_punct(&token, '#') {
            let mut bang = None;
            if tokens.peek().is_some_and(|t| is_punct(t, '!')) {
                bang = tokens.next();
            }
            if let Some(TokenTree::Group(group)) = tokens.peek()
                && group.delimiter() == Delimiter::Bracket
            {
                let text = group.stream().to_string().replace(' ', "");
                if text.starts_with("doc=") || text.starts_with("doc(") {
                    tokens.next();
                    continue;
                }
                if text == "cfg(test)" && bang.is_none() {
                    tokens.next();
                    // The item ends at its first `;` or braces.
                    for t in tokens.by_ref() {
                        if is_punct(&t, ';') || matches!(&t, TokenTree::Group(g) if g.delimiter() == Delimiter::Brace) {
                            break;
                        }
                    }
                    continue;
                }
            }
            out.push(token);
            out.extend(bang);
        } else if let TokenTree::Group(group) = &token {
            let inner = strip(group.stream()).into_iter().collect();
            out.push(TokenTree::Group(proc_macro2::Group::new(group.delimiter(), inner)));
        } else {
            out.push(token);
        }
    }
    out
}

fn is_punct(token: &TokenTree, c: char) -> bool {
    matches!(token, TokenTree::Punct(p) if p.as_char() == c)
}

fn ident(token: Option<&TokenTree>) -> Option<String> {
    match token {
        Some(TokenTree::Ident(i)) => Some(i.to_string()),
        _ => None,
    }
}

fn find_children(tokens: &[TokenTree], children: &mut BTreeSet<String>) {
    for w in tokens.windows(3) {
        if ident(w.first()).as_deref() == Some("mod") && is_punct(&w[2], ';') {
            children.extend(ident(w.get(1)));
        }
    }
}

/// Collects every `a::b::c`, and every tree below `use`.
fn collect_names(tokens: &[TokenTree], module: &[String], children: &BTreeSet<String>, out: &mut Module) {
    let mut i = 0;
    while i < tokens.len() {
        match &tokens[i] {
            TokenTree::Group(group) => {
                collect_names(&group.stream().into_iter().collect::<Vec<_>>(), module, children, out);
                i += 1;
            }
            TokenTree::Ident(id) if *id == "use" => {
                let public = i > 0 && (ident(tokens.get(i - 1)).as_deref() == Some("pub"));
                let end = (i + 1..tokens.len()).find(|&j| is_punct(&tokens[j], ';')).unwrap_or(tokens.len());
                let mut leaves = Vec::new();
                use_tree(&tokens[i + 1..end], &mut Vec::new(), &mut leaves);
                for (path, alias) in leaves {
                    let path = absolute(path, module, children);
                    if public {
                        out.reexports.insert(alias, path.clone());
                    }
                    out.names.insert(path);
                }
                i = end + 1;
            }
            TokenTree::Ident(_) => {
                let mut path = vec![ident(tokens.get(i)).expect("is an identifier")];
                let mut j = i + 1;
                while j + 2 < tokens.len() && is_punct(&tokens[j], ':') && is_punct(&tokens[j + 1], ':') {
                    let Some(next) = ident(tokens.get(j + 2)) else { break };
                    path.push(next);
                    j += 3;
                }
                if path.len() > 1 {
                    out.names.insert(absolute(path, module, children));
                }
                i = j;
            }
            _ => i += 1,
        }
    }
}

/// The leaves of `a::{b, c::d as e}`, each with the name it is known by.
fn use_tree(tokens: &[TokenTree], prefix: &mut Vec<String>, leaves: &mut Vec<(Vec<String>, String)>) {
    let base = prefix.len();
    let mut i = 0;
    let mut alias = None;
    while i < tokens.len() {
        match &tokens[i] {
            TokenTree::Ident(id) if *id == "as" => {
                alias = ident(tokens.get(i + 1));
                i += 2;
            }
            TokenTree::Ident(id) => {
                prefix.push(id.to_string());
                i += 1;
            }
            TokenTree::Group(group) => {
                let inner: Vec<_> = group.stream().into_iter().collect();
                for part in inner.split(|t| is_punct(t, ',')).filter(|p| !p.is_empty()) {
                    use_tree(part, &mut prefix.clone(), leaves);
                }
                prefix.truncate(base);
                return;
            }
            _ => i += 1,
        }
    }
    if prefix.len() > base {
        let name = alias.unwrap_or_else(|| prefix.last().expect("not empty").clone());
        leaves.push((prefix.clone(), name));
    }
    prefix.truncate(base);
}

fn absolute(mut path: Vec<String>, module: &[String], children: &BTreeSet<String>) -> Vec<String> {
    if path.last().is_some_and(|p| p == "self") {
        path.pop();
    }
    match path.first().map(String::as_str) {
        Some("crate") => [&module[..1], &path[1..]].concat(),
        Some("self") => [module, &path[1..]].concat(),
        Some("super") => {
            let ups = path.iter().take_while(|p| *p == "super").count();
            [&module[..module.len().saturating_sub(ups).max(1)], &path[ups..]].concat()
        }
        Some(first) if children.contains(first) => [module, &path[..]].concat(),
        _ => path,
    }
}

/// The literal in `const KIND: &'static str = "…"` inside `impl Stage for …`.
fn find_kind(tokens: &[TokenTree]) -> Option<String> {
    for (i, token) in tokens.iter().enumerate() {
        if let TokenTree::Group(group) = token
            && group.delimiter() == Delimiter::Brace
        {
            let is_stage =
                tokens[..i].iter().rev().take(8).any(|t| matches!(t, TokenTree::Ident(id) if *id == "Stage"))
                    && tokens[..i].iter().rev().take(8).any(|t| matches!(t, TokenTree::Ident(id) if *id == "impl"));
            if is_stage {
                let inner: Vec<_> = group.stream().into_iter().collect();
                let at = inner.iter().position(|t| matches!(t, TokenTree::Ident(id) if *id == "KIND"))?;
                return inner[at..].iter().find_map(|t| match t {
                    TokenTree::Literal(l) => Some(l.to_string().trim_matches('"').to_owned()),
                    _ => None,
                });
            }
        }
    }
    None
}

fn locked_versions(lock: &Path) -> BTreeMap<String, String> {
    let Ok(text) = fs::read_to_string(lock) else { return BTreeMap::new() };
    let Ok(table) = text.parse::<toml::Table>() else { return BTreeMap::new() };
    let packages = table.get("package").and_then(toml::Value::as_array).cloned().unwrap_or_default();
    let field = |p: &toml::Value, f: &str| p.get(f).and_then(toml::Value::as_str).map(str::to_owned);
    packages.iter().filter_map(|p| Some((field(p, "name")?, field(p, "version")?))).collect()
}
