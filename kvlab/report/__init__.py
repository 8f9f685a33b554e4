def write_report(runs, out):
    out.mkdir(parents=True, exist_ok=True); return out
def console_table(runs): print("table", runs)
